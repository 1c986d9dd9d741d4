//! Copies of images that cost what they hold.

use super::GuestError;
use rustix::fs::{SeekFrom, copy_file_range, ftruncate, ioctl_ficlone, seek};
use rustix::io::Errno;
use std::fs::File;
use std::path::Path;

/// Copies a file, holes as holes; where the file system can, as a clone that shares all blocks.
pub fn copy_sparse(from: &Path, to: &Path) -> Result<(), GuestError> {
    let source = File::open(from).map_err(GuestError::io("open", from))?;
    let target = File::create(to).map_err(GuestError::io("create", to))?;
    if ioctl_ficlone(&target, &source).is_ok() {
        return Ok(());
    }
    let len = source
        .metadata()
        .map_err(GuestError::io("look at", from))?
        .len();
    copy_data(&source, &target, len).map_err(|errno| GuestError::io("copy to", to)(errno.into()))
}

fn copy_data(source: &File, target: &File, len: u64) -> Result<(), Errno> {
    ftruncate(target, len)?;
    let mut at = 0;
    while at < len {
        let start = match seek(source, SeekFrom::Data(at)) {
            Ok(start) => start,
            // Nothing but a hole is left.
            Err(Errno::NXIO) => return Ok(()),
            Err(errno) => return Err(errno),
        };
        let end = seek(source, SeekFrom::Hole(start))?;
        let (mut from, mut to) = (start, start);
        while from < end {
            let chunk = usize::try_from(end - from)
                .unwrap_or(usize::MAX)
                .min(1 << 30);
            if copy_file_range(source, Some(&mut from), target, Some(&mut to), chunk)? == 0 {
                // The file became shorter under the copy.
                return Err(Errno::IO);
            }
        }
        at = end;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{FileExt, MetadataExt};

    #[test]
    fn content_is_kept_and_holes_stay_holes() {
        let dir = tempfile::tempdir().expect("a folder");
        let (from, to) = (dir.path().join("a"), dir.path().join("b"));
        let file = File::create(&from).expect("a file");
        file.set_len(64 << 20).expect("long");
        file.write_all_at(b"near", 0).expect("written");
        file.write_all_at(b"far", (32 << 20) + 5).expect("written");
        copy_sparse(&from, &to).expect("copied");
        assert_eq!(
            std::fs::read(&from).expect("read"),
            std::fs::read(&to).expect("read")
        );
        let allocated = std::fs::metadata(&to).expect("there").blocks() * 512;
        assert!(allocated < 1 << 20, "{allocated} bytes allocated");
    }
}
