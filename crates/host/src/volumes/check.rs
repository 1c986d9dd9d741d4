//! Looking a volume over: is it what its record says, is its image whole, is its journal readable.
//!
//! What `repair` does is only what loses nothing: an image's reference counts are made to follow from its
//! tables, which alone say what the guest reads; and what a move left behind in the volume's folder and
//! nothing names any more is removed. A damaged journal is never touched: it may be the only word on what
//! the guest wrote.

use std::path::{Path, PathBuf};

use whimbrel_volume::VolumeError;
use whimbrel_volume::backend::{Backend, Format, check_image};
use whimbrel_volume::journal::{Journal, RecoveryHow, VolumeIdentity};
use whimbrel_volume::raw::Access;

use crate::api::types::{CheckView, CheckVolume, Finding, FindingKind};
use crate::api::{ApiError, ErrorCode};
use crate::daemon::Daemon;
use crate::state::{ByteSize, Name, Ownership, VolumeRecord};

const JOURNAL: &str = "journal-";

/// What was found so far.
#[derive(Default)]
struct Findings(Vec<Finding>);

impl Findings {
    fn add(&mut self, kind: FindingKind, what: impl Into<String>) {
        self.0.push(Finding {
            what: what.into(),
            kind,
            next_step: None,
        });
    }

    fn advise(&mut self, kind: FindingKind, what: impl Into<String>, next: &str) {
        self.0.push(Finding {
            what: what.into(),
            kind,
            next_step: Some(next.to_string()),
        });
    }
}

impl Daemon {
    pub(crate) async fn look_over(
        &self,
        name: Name,
        request: CheckVolume,
    ) -> Result<CheckView, ApiError> {
        let record = self.host.state.volume(&name)?;
        let folder = self.host.state.volume_folder(&name);
        let mut found = Findings::default();
        let alone = match self.alone(&name).await {
            Ok((_, claim)) => {
                if request.repair {
                    self.host.trackers.lose(&self.host.state, &record);
                }
                Some(claim)
            }
            Err(error) if request.repair => return Err(error),
            Err(error) if error.code == ErrorCode::NotFound => return Err(error),
            Err(_) => None,
        };
        found.add(
            FindingKind::Good,
            format!(
                "its record is readable: {}, {}, epoch {}",
                record.format, record.state, record.epoch.0
            ),
        );
        if alone.is_some() {
            self.look_at_data(&record, &folder, request.repair, &mut found)
                .await;
        } else {
            found.add(
                FindingKind::Good,
                "its content is in use, or not this host's alone, and was left out",
            );
        }
        self.look_at_journals(
            &record,
            &folder,
            alone.is_some() && request.repair,
            &mut found,
        )
        .await?;
        if alone.is_some() {
            look_at_leftovers(&record, &folder, request.repair, &mut found);
        }
        let verdict = found.0.iter().map(|f| f.kind).max();
        Ok(CheckView {
            volume: name,
            verdict: verdict.unwrap_or(FindingKind::Good),
            findings: found.0,
        })
    }

    async fn look_at_data(
        &self,
        record: &VolumeRecord,
        folder: &Path,
        repair: bool,
        found: &mut Findings,
    ) {
        let pool = &self.host.pool;
        let path = record.data_path(folder);
        let advice = "restore the file from a backup, or remove the volume";
        if record.format == Format::Qcow2 {
            match check_image(pool, path.clone(), repair).await {
                Ok(counts) => {
                    let (missing, leaked) = (counts.missing, counts.leaked);
                    found.add(
                        FindingKind::Good,
                        format!(
                            "its image's tables are whole: {} clusters in use",
                            counts.used
                        ),
                    );
                    let what = format!(
                        "its image was not closed: {missing} clusters in use count as free, {leaked} free ones as used"
                    );
                    match (missing + leaked > 0 || counts.dirty, repair) {
                        (false, _) => {}
                        (true, true) => found.add(FindingKind::Repaired, what),
                        (true, false) => found.advise(
                            FindingKind::Untidy,
                            what,
                            "nothing need be done: the next machine to open it counts anew; or say --repair",
                        ),
                    }
                    if counts.dirty && !repair {
                        // Opening it would put it right, and nobody asked for that.
                        return;
                    }
                }
                Err(error) => {
                    found.advise(FindingKind::Broken, error.to_string(), advice);
                    return;
                }
            }
        }
        match Backend::open(pool, path, record.format, Access::ReadOnly).await {
            Err(error @ VolumeError::InUse { .. }) => {
                found.advise(
                    FindingKind::Broken,
                    error.to_string(),
                    "see who has it: `lsblk`, `lsof`",
                );
            }
            Err(error) => found.advise(FindingKind::Broken, error.to_string(), advice),
            Ok(disk) if disk.size() < record.size => found.advise(
                FindingKind::Broken,
                format!(
                    "it has {} bytes, its record says {}",
                    disk.size(),
                    record.size
                ),
                "what is missing is lost; `volume resize` to less makes the rest usable",
            ),
            Ok(disk) => {
                let taken = disk.allocated().await.unwrap_or(0);
                found.add(
                    FindingKind::Good,
                    format!(
                        "its content opens and has its {} ({} taken)",
                        ByteSize(record.size),
                        ByteSize(taken)
                    ),
                );
            }
        }
    }

    async fn look_at_journals(
        &self,
        record: &VolumeRecord,
        folder: &Path,
        repair: bool,
        found: &mut Findings,
    ) -> Result<(), ApiError> {
        for (name, path) in entries(folder) {
            let Some(epoch) = name.strip_prefix(JOURNAL).and_then(|e| e.parse().ok()) else {
                continue;
            };
            let identity = VolumeIdentity {
                uuid: record.uuid.0,
                size: record.size,
                epoch,
            };
            if record.state == Ownership::Local {
                // Its work is done: the record says that everything is here.
                if repair {
                    let removed = Journal::remove(&self.host.pool, &path).await;
                    removed.map_err(crate::service::errors::volume_error)?;
                    let _ = std::fs::remove_dir(&path);
                }
                found.advise(
                    if repair {
                        FindingKind::Repaired
                    } else {
                        FindingKind::Untidy
                    },
                    format!("a finished move left its journal, {name}"),
                    if repair {
                        "nothing"
                    } else {
                        "harmless; --repair removes it"
                    },
                );
                continue;
            }
            match Journal::inspect(&self.host.pool, &path, identity).await {
                Ok(known) => {
                    let units = identity.units();
                    let how = match known.how {
                        RecoveryHow::Complete => "everything is here".to_string(),
                        RecoveryHow::Clean => "it was closed in order".to_string(),
                        RecoveryHow::SameBoot { kept } => {
                            format!("its daemon ended in the middle; all {kept} records stand")
                        }
                        RecoveryHow::HostRestarted { kept, dropped } => format!(
                            "the host went down; {kept} records stand, {dropped} were never promised and are not believed"
                        ),
                    };
                    found.add(
                        FindingKind::Good,
                        format!(
                            "{name} is readable: {how}; {} of {units} units are here, {} the guest's own",
                            known.resident.len(),
                            known.guest_owned.len()
                        ),
                    );
                }
                Err(VolumeError::JournalBusy { .. }) => {
                    found.add(FindingKind::Good, format!("{name} is in use and was left out"));
                }
                Err(VolumeError::JournalAbsent { .. }) => {
                    found.add(FindingKind::Untidy, format!("{name} is empty"));
                }
                Err(error) => found.advise(
                    FindingKind::Broken,
                    error.to_string(),
                    "nothing was changed and nothing is to be guessed; docs/volumes.md says what can be done",
                ),
            }
        }
        Ok(())
    }
}

/// Old content and drafts that no record names.
fn look_at_leftovers(record: &VolumeRecord, folder: &Path, repair: bool, found: &mut Findings) {
    for (name, path) in entries(folder) {
        let old_data = name.starts_with("data") && Path::new(&name) != record.data;
        if !old_data && !name.starts_with(".draft-") {
            continue;
        }
        let removed = repair && std::fs::remove_file(&path).is_ok();
        found.advise(
            if removed {
                FindingKind::Repaired
            } else {
                FindingKind::Untidy
            },
            format!("{name} lies in its folder and nothing names it"),
            if removed {
                "nothing"
            } else {
                "harmless but for the room it takes; --repair removes it"
            },
        );
    }
}

fn entries(folder: &Path) -> Vec<(String, PathBuf)> {
    let Ok(entries) = std::fs::read_dir(folder) else {
        return Vec::new();
    };
    let mut all: Vec<_> = entries
        .flatten()
        .map(|e| (e.file_name().to_string_lossy().into_owned(), e.path()))
        .collect();
    all.sort();
    all
}
