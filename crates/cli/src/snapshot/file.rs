//! A volume of a snapshot as a raw file, without a daemon. What is zero stays a hole.

use super::untouched;
use crate::context::Context;
use crate::error::CliError;
use crate::progress::ImportShow;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use whimbrel_host::api::ImportProgress;
use whimbrel_repository::read::VolumeReader;
use whimbrel_repository::{EXTENT, Repository, SnapshotName};

/// A file that is not yet what it is to be; gone when this goes.
struct Part(PathBuf);

impl Drop for Part {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

pub fn restore(
    context: &Context,
    dir: &Path,
    snapshot: &SnapshotName,
    volume: Option<String>,
    to: &Path,
) -> Result<(), CliError> {
    let failed = |action| {
        let path = to.to_path_buf();
        move |source| CliError::File {
            action,
            path,
            source,
        }
    };
    if to.symlink_metadata().is_ok() {
        return Err(failed("make")(io::ErrorKind::AlreadyExists.into()));
    }
    let repository = Arc::new(Repository::at(dir).map_err(untouched)?);
    let (reader, _) =
        VolumeReader::open(repository, snapshot, volume.as_deref()).map_err(untouched)?;
    let name = to.file_name().unwrap_or_default().to_string_lossy();
    let part = Part(to.with_file_name(format!(".{name}.whimbrel-{}", std::process::id())));
    let mut options = File::options();
    let file = options.write(true).create_new(true).mode(0o600);
    let file = file.open(&part.0).map_err(failed("make"))?;
    file.set_len(reader.size()).map_err(failed("write"))?;
    let mut shown = ImportShow::new(context.json, &name);
    let total = reader.size();
    for extent in 0..reader.tree().extents() {
        let content = reader.extent(extent).map_err(untouched)?;
        if let Some(content) = content {
            let written = file.write_all_at(&content, extent * EXTENT);
            written.map_err(failed("write"))?;
        }
        let done = ((extent + 1) * EXTENT).min(total);
        shown.show(ImportProgress { done, total });
    }
    shown.finish();
    file.sync_all().map_err(failed("write"))?;
    // A link, and not a rename: it never replaces a file that came meanwhile.
    fs::hard_link(&part.0, to).map_err(failed("make"))?;
    drop(part);
    let folder = to.parent().unwrap_or(Path::new("/"));
    let synced = File::open(folder).and_then(|folder| folder.sync_all());
    synced.map_err(failed("make durable"))?;
    let volume = &reader.tree().name;
    context.done(&format!(
        "volume {volume} of snapshot {snapshot} is in {}",
        to.display()
    ));
    Ok(())
}
