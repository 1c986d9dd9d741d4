//! `whimbrel snapshot ...`
//!
//! Making a snapshot and making a volume of one are the daemon's. All else is done here, by whoever may read
//! or write the repository: it needs no daemon, and works where none was ever.

pub mod args;
mod file;
mod text;

use crate::context::Context;
use crate::error::CliError;
use crate::progress::ImportShow;
use crate::show;
use crate::volume::whole_path;
use args::SnapshotCommand;
use hyper::Method;
use serde::Serialize;
use std::path::Path;
use whimbrel_host::api::{
    ApiError, CreateSnapshot, Format, ImportProgress, ImportVolume, Listed, SnapshotView,
    SnapshotVolume, VolumeView,
};
use whimbrel_host::snapshots::repository_error;
use whimbrel_host::state::Name;
use whimbrel_repository::collect::Collected;
use whimbrel_repository::{
    Consistency, EXTENT, Manifest, Repository, RepositoryError, SnapshotName,
};

/// A snapshot as it is listed.
#[derive(Serialize)]
pub struct Item {
    pub name: SnapshotName,
    pub uuid: String,
    pub machine: String,
    pub host: String,
    pub taken: String,
    pub consistency: Consistency,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub parent: Option<SnapshotName>,
    pub volumes: Vec<ItemVolume>,
    /// The machine's description, TOML; when one snapshot is shown.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub description: String,
}

#[derive(Serialize)]
pub struct ItemVolume {
    pub name: String,
    pub uuid: String,
    pub size: u64,
}

impl From<Manifest> for Item {
    fn from(manifest: Manifest) -> Item {
        let volumes = manifest.volumes.into_iter().map(|tree| ItemVolume {
            name: tree.name,
            uuid: tree.uuid,
            size: tree.size,
        });
        Item {
            name: manifest.name,
            uuid: manifest.uuid,
            machine: manifest.machine,
            host: manifest.host,
            taken: manifest.taken,
            consistency: manifest.consistency,
            parent: manifest.parent,
            volumes: volumes.collect(),
            description: manifest.description,
        }
    }
}

/// What a removal did.
#[derive(Serialize)]
struct Removed {
    #[serde(skip_serializing_if = "Option::is_none")]
    removed: Option<SnapshotName>,
    #[serde(flatten)]
    collected: Collected,
}

pub async fn snapshot(context: &Context, command: SnapshotCommand) -> Result<(), CliError> {
    match command {
        SnapshotCommand::Create { machine, to, name } => create(context, machine, &to, name).await,
        SnapshotCommand::Ls { dir } => list(context, &dir),
        SnapshotCommand::Show { dir, snapshot } => {
            let manifest = open(&dir)?.manifest(&snapshot).map_err(untouched)?;
            context.answer(&Item::from(manifest), text::one);
            Ok(())
        }
        SnapshotCommand::Verify { dir, snapshot } => verify(context, &dir, snapshot),
        SnapshotCommand::Rm { dir, snapshot } => {
            let collected = open(&dir)?.remove(&snapshot).map_err(untouched)?;
            let gone = format!("snapshot `{snapshot}` is gone, what it took is not yet free");
            let collected =
                collected.map_err(|error| repository_error(error).machine_state(gone))?;
            let removed = Removed {
                removed: Some(snapshot),
                collected,
            };
            context.answer(&removed, told_removed);
            Ok(())
        }
        SnapshotCommand::Gc { dir } => {
            let collected = open(&dir)?.collect().map_err(|error| {
                repository_error(error).machine_state("every snapshot is there as before")
            })?;
            let removed = Removed {
                removed: None,
                collected,
            };
            context.answer(&removed, told_removed);
            Ok(())
        }
        SnapshotCommand::Restore {
            dir,
            snapshot,
            volume,
            to,
        } => match to.contains('/') {
            true => file::restore(context, &dir, &snapshot, volume, Path::new(&to)),
            false => restore(context, &dir, snapshot, volume, &to).await,
        },
    }
}

fn untouched(error: RepositoryError) -> ApiError {
    repository_error(error).machine_state("the repository is as it was")
}

fn open(dir: &Path) -> Result<Repository, CliError> {
    Ok(Repository::at(dir).map_err(untouched)?)
}

async fn create(
    context: &Context,
    machine: Name,
    to: &Path,
    name: Option<SnapshotName>,
) -> Result<(), CliError> {
    let request = CreateSnapshot {
        repository: whole_path(to)?,
        name,
    };
    let path = format!("/v1/machines/{machine}/snapshot");
    let mut shown = ImportShow::new(context.json, machine.as_str());
    let news = |progress: ImportProgress| shown.show(progress);
    let client = &context.client;
    let made: SnapshotView = client
        .stream(Method::POST, &path, Some(&request), news)
        .await?;
    shown.finish();
    context.answer(&made, text::made);
    Ok(())
}

fn list(context: &Context, dir: &Path) -> Result<(), CliError> {
    let repository = open(dir)?;
    let mut listed = Listed {
        items: Vec::new(),
        damaged: Vec::new(),
    };
    for name in repository.names().map_err(untouched)? {
        match repository.manifest(&name) {
            Ok(manifest) => listed.items.push(Item {
                description: String::new(),
                ..Item::from(manifest)
            }),
            // Removed since the names were read.
            Err(RepositoryError::NoSnapshot { .. }) => {}
            Err(error) => listed.damaged.push(untouched(error)),
        }
    }
    listed.items.sort_by(|a, b| a.taken.cmp(&b.taken));
    context.answer_list(&listed, text::list);
    Ok(())
}

fn verify(context: &Context, dir: &Path, only: Option<SnapshotName>) -> Result<(), CliError> {
    let repository = open(dir)?;
    let mut shown = ImportShow::new(context.json, "verify");
    let verified = repository
        .verify(only.as_ref(), |done, total| {
            shown.show(ImportProgress {
                done: done * EXTENT,
                total: total * EXTENT,
            });
        })
        .map_err(untouched)?;
    shown.finish();
    context.answer(&verified, text::verified);
    match verified.damaged {
        0 => Ok(()),
        _ => Err(CliError::RepositoryDamaged {
            place: dir.to_path_buf(),
        }),
    }
}

async fn restore(
    context: &Context,
    dir: &Path,
    snapshot: SnapshotName,
    volume: Option<String>,
    to: &str,
) -> Result<(), CliError> {
    let name: Name = to.parse().map_err(|e| {
        ApiError::new(
            whimbrel_host::api::ErrorCode::Invalid,
            format!("`{to}` is no volume's name: {e}"),
        )
        .machine_state("no volume was made")
        .next_step("choose another name; a file is named with a `/`: ./FILE")
    })?;
    let request = ImportVolume {
        name,
        file: None,
        uri: None,
        snapshot: Some(SnapshotVolume {
            repository: whole_path(dir)?,
            snapshot,
            volume,
        }),
        format: None,
        to: Format::Raw,
        device: None,
    };
    let mut shown = ImportShow::new(context.json, to);
    let news = |progress: ImportProgress| shown.show(progress);
    let client = &context.client;
    let view: VolumeView = client
        .stream(Method::POST, "/v1/imports", Some(&request), news)
        .await?;
    shown.finish();
    context.answer(&view, show::volume);
    Ok(())
}

fn told_removed(removed: &Removed) -> String {
    let what = match &removed.removed {
        Some(name) => format!("snapshot {name} is gone; "),
        None => String::new(),
    };
    let collected = &removed.collected;
    format!(
        "{what}{} objects removed, {} free again; {} are needed",
        collected.removed,
        show::bytes(collected.freed_bytes),
        collected.kept
    )
}
