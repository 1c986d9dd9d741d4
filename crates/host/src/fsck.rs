//! Explaining a state directory to a person: what it holds, what is wrong with it, and what a daemon started on
//! it would do next.
//!
//! Reads only, needs no daemon, and takes any directory it is given: of this host, of another, from a backup.
//! Records are read one by one, so that one that is damaged does not hide the others. What is said of a migration
//! comes from its journal by the very state machines that a daemon would take it up with.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Serialize;
use whimbrel_engine::switchover::{Action, Destination, Phase, Record, Source};
use whimbrel_volume::backend::Format;
use whimbrel_volume::journal::{Journal, Recovered, RecoveryHow};
use whimbrel_volume::pool::{Pool, PoolSize};

use crate::api::types::{Finding, FindingKind};
use crate::migration::record::{is_over, read_journal};
use crate::state::{
    ByteSize, MachineRuntime, MachineSpec, MigrationId, Name, Ownership, StateDir, StateError,
    VolumeRecord,
};

/// Something in the directory, and what there is to say of it.
#[derive(Clone, Debug, Serialize)]
pub struct Explained {
    /// `machine web1`, `volume root`, `migration 6f1c...`.
    pub what: String,
    pub path: PathBuf,
    pub findings: Vec<Finding>,
}

/// A whole directory.
#[derive(Clone, Debug, Serialize)]
pub struct Explanation {
    pub root: PathBuf,
    /// The worst of all findings.
    pub verdict: FindingKind,
    pub items: Vec<Explained>,
}

impl Explained {
    fn new(what: String, path: PathBuf) -> Self {
        Explained {
            what,
            path,
            findings: Vec::new(),
        }
    }

    fn good(&mut self, what: impl Into<String>) {
        self.add(FindingKind::Good, what.into(), None);
    }

    fn untidy(&mut self, what: impl Into<String>, next: impl Into<String>) {
        self.add(FindingKind::Untidy, what.into(), Some(next.into()));
    }

    fn broken(&mut self, what: impl Into<String>, next: impl Into<String>) {
        self.add(FindingKind::Broken, what.into(), Some(next.into()));
    }

    fn add(&mut self, kind: FindingKind, what: String, next_step: Option<String>) {
        self.findings.push(Finding {
            kind,
            what,
            next_step,
        });
    }
}

/// What is known of a migration from its folder.
struct Move {
    over: bool,
    outgoing: bool,
    granted: bool,
}

struct Examination {
    dir: StateDir,
    items: Vec<Explained>,
    volumes: BTreeMap<Name, VolumeRecord>,
    machines: BTreeMap<Name, (MachineSpec, MachineRuntime)>,
    moves: BTreeMap<MigrationId, Move>,
}

/// Explains the state directory at `root`.
///
/// # Errors
/// If it is no state directory, is of a version that this program does not know, or cannot be listed.
pub async fn explain(root: &Path) -> Result<Explanation, StateError> {
    let pool =
        Pool::start(PoolSize::default()).map_err(StateError::io("start threads for", root))?;
    let mut all = Examination {
        dir: StateDir::open(root)?,
        items: Vec::new(),
        volumes: BTreeMap::new(),
        machines: BTreeMap::new(),
        moves: BTreeMap::new(),
    };
    all.host();
    all.migrations()?;
    let (machines, volumes) = (all.dir.machines()?, all.dir.volumes()?);
    all.damaged(machines.damaged);
    all.damaged(volumes.damaged);
    for (spec, runtime) in machines.records {
        all.machines.insert(spec.name.clone(), (spec, runtime));
    }
    for record in volumes.records {
        all.volumes.insert(record.name.clone(), record);
    }
    for (spec, runtime) in all.machines.values() {
        let item = all.machine(spec, runtime);
        all.items.push(item);
    }
    for record in all.volumes.values() {
        let item = all.volume(record, &pool).await;
        all.items.push(item);
    }
    let findings = all.items.iter().flat_map(|item| &item.findings);
    let verdict = findings.map(|f| f.kind).max().unwrap_or(FindingKind::Good);
    Ok(Explanation {
        root: all.dir.root().to_path_buf(),
        verdict,
        items: all.items,
    })
}

impl Examination {
    fn host(&mut self) {
        let mut item = Explained::new("host".to_string(), self.dir.root().to_path_buf());
        match self.dir.host() {
            Ok(host) => item.good(format!("the state directory of host `{}`", host.name)),
            Err(error) => item.broken(
                error.to_string(),
                "restore host.toml from a backup; a daemon does not start without it",
            ),
        }
        let key = self.dir.identity_path();
        match whimbrel_peer::identity::Identity::load(&key) {
            Ok(identity) => item.good(format!("its key is {}", identity.key_id())),
            Err(error) => item.broken(
                error.to_string(),
                "restore host-key.pem from a backup: peers know this host by it alone",
            ),
        }
        match whimbrel_peer::trust::TrustStore::load(self.dir.peers_path()) {
            Ok(trust) => item.good(format!("it trusts {} hosts", trust.list().len())),
            Err(error) => item.broken(error.to_string(), "restore peers.toml from a backup"),
        }
        self.items.push(item);
    }

    fn damaged(&mut self, errors: Vec<StateError>) {
        for error in errors {
            let mut item = Explained::new("a record".to_string(), self.dir.root().to_path_buf());
            item.broken(
                error.to_string(),
                "restore the file that is named from a backup; until then its machine or volume is left alone",
            );
            self.items.push(item);
        }
    }

    fn migrations(&mut self) -> Result<(), StateError> {
        let listing = self.dir.migrations()?;
        self.damaged(listing.damaged);
        for id in listing.records {
            let folder = self.dir.migration_folder(&id);
            let mut item = Explained::new(format!("migration {id}"), folder.clone());
            let over = is_over(&folder);
            match read_journal(&folder) {
                Ok((records, torn)) => {
                    if torn {
                        item.untidy(
                            "the last line of its journal is torn: it was never acted on",
                            "nothing: the next daemon drops it",
                        );
                    }
                    self.moves
                        .insert(id, explain_move(&mut item, &folder, &records, over));
                }
                Err(error) => item.broken(
                    format!("{error}: what was written there decides who owns the machine"),
                    "compare with the journal of the same number at the other host; no daemon touches this one",
                ),
            }
            self.items.push(item);
        }
        Ok(())
    }

    fn machine(&self, spec: &MachineSpec, runtime: &MachineRuntime) -> Explained {
        let path = self.dir.machine_folder(&spec.name);
        let mut item = Explained::new(format!("machine {}", spec.name), path);
        item.good(format!("{} under {}", runtime.ownership, runtime.epoch));
        match &runtime.process {
            Some(process) if process.is_alive() => {
                item.good(format!("its QEMU is process {}", process.pid));
            }
            Some(process) => item.untidy(
                format!("its QEMU, process {}, is gone", process.pid),
                "the next daemon shows the machine as crashed; `whimbrel machine start` if it is local",
            ),
            None => item.good("it has no QEMU here"),
        }
        self.machine_and_move(&mut item, runtime);
        for disk in &spec.disks {
            match self.volumes.get(&disk.volume) {
                None => item.broken(
                    format!("its disk, volume `{}`, is not here", disk.volume),
                    "restore the volume, or describe the machine anew",
                ),
                Some(volume) if is_at_odds(&runtime.ownership, &volume.state) => item.broken(
                    format!(
                        "it is {}, its disk `{}` is {}",
                        runtime.ownership, disk.volume, volume.state
                    ),
                    "look at the migration's journal, which is right; a start is refused until both agree",
                ),
                Some(_) => {}
            }
        }
        item
    }

    /// Whether the machine's record and the migration's journal tell the same.
    fn machine_and_move(&self, item: &mut Explained, runtime: &MachineRuntime) {
        let (migration, arriving) = match &runtime.ownership {
            Ownership::Local => return,
            Ownership::Arriving { migration } => (migration, true),
            Ownership::Departed { migration, .. } => (migration, false),
        };
        match self.moves.get(migration) {
            None if arriving => item.broken(
                format!("nothing here tells of its migration {migration}"),
                "ask the host it comes from; without the journal no daemon goes on with it",
            ),
            // Its folder may have been tidied away long ago.
            None => item.good("the journal of its move is not kept any more"),
            Some(found) if arriving && found.outgoing => item.broken(
                "its migration is one away from here",
                "look at both hosts' journals before anything is started",
            ),
            Some(found) if !arriving && found.outgoing && !found.granted => item.untidy(
                "it counts as departed, yet its journal has no grant",
                "start the daemon: it takes the machine back",
            ),
            Some(found) if arriving && found.over => item.broken(
                "it counts as arriving, yet its migration is marked as over",
                "look at both hosts' journals: no daemon goes on with it",
            ),
            Some(_) => {}
        }
    }

    async fn volume(&self, record: &VolumeRecord, pool: &Pool) -> Explained {
        let folder = self.dir.volume_folder(&record.name);
        let mut item = Explained::new(format!("volume {}", record.name), folder.clone());
        item.good(format!(
            "{}, {}, {} under {}",
            ByteSize(record.size),
            record.format,
            record.state,
            record.epoch
        ));
        let data = record.data_path(&folder);
        match std::fs::metadata(&data) {
            Ok(file) if record.format == Format::Raw && file.len() < record.size => item.broken(
                format!(
                    "{} has {} bytes, fewer than the volume",
                    data.display(),
                    file.len()
                ),
                "what is missing is lost; restore it from a backup",
            ),
            Ok(_) => {}
            Err(error) => item.broken(
                format!("{}: {error}", data.display()),
                "restore the file from a backup, or remove the volume",
            ),
        }
        if let Some(machine) = &record.machine
            && !self.machines.contains_key(machine)
        {
            item.untidy(
                format!("it belongs to machine `{machine}`, which is not here"),
                "nothing if the machine was undefined; `whimbrel volume rm` removes the volume",
            );
        }
        if matches!(record.state, Ownership::Arriving { .. }) {
            arrived(&mut item, record, &folder, pool).await;
        }
        item
    }
}

/// How much of an arriving volume is here, by its residency journal.
async fn arrived(item: &mut Explained, record: &VolumeRecord, folder: &Path, pool: &Pool) {
    let (identity, journal) = (record.identity(), record.journal_path(folder));
    match Journal::inspect(pool, &journal, identity).await {
        Ok(found) => tell_of_arrival(item, identity.units(), &found),
        Err(error) => item.broken(
            format!("its residency journal: {error}"),
            "leave it as it is: it may be the only word on what the guest wrote here",
        ),
    }
}

fn tell_of_arrival(item: &mut Explained, units: u64, found: &Recovered) {
    item.good(format!(
        "{} of {units} units are here, {} of them the guest's own, {} more in part",
        found.resident.len(),
        found.guest_owned.len(),
        found.partial.len()
    ));
    match found.how {
        RecoveryHow::HostRestarted { dropped, .. } => item.good(format!(
            "the host was restarted since; {dropped} records that no flush had made durable are not believed"
        )),
        RecoveryHow::SameBoot { .. } => item.good("its daemon did not close it: nothing is lost by that"),
        RecoveryHow::Clean | RecoveryHow::Complete => {}
    }
    if found.fell_back {
        item.untidy(
            "the newest snapshot of its journal is damaged; the one before gave the same knowledge",
            "look after the disk that holds the state directory",
        );
    }
}

/// A machine's disks are where it is. While it is handed over its disks stay local until all is over.
fn is_at_odds(machine: &Ownership, volume: &Ownership) -> bool {
    match (machine, volume) {
        (Ownership::Local, other) => *other != Ownership::Local,
        (Ownership::Arriving { .. }, other) => !matches!(other, Ownership::Arriving { .. }),
        (Ownership::Departed { .. }, other) => matches!(other, Ownership::Arriving { .. }),
    }
}

fn explain_move(item: &mut Explained, folder: &Path, records: &[Record], over: bool) -> Move {
    let incoming = matches!(
        records.first(),
        Some(Record::Preparing { .. } | Record::Refused { .. })
    );
    let granted = records
        .iter()
        .any(|record| matches!(record, Record::Granted { .. }));
    let read = |file: &str| StateDir::read_text(&folder.join(file)).ok().flatten();
    let peer = read("peer").unwrap_or_else(|| "an unknown host".to_string());
    let machine = read("machine").unwrap_or_else(|| "a machine".to_string());
    let last = records.last().map_or("nothing".to_string(), |record| {
        serde_json::to_string(record).expect("a record is plain data")
    });
    let way = if incoming {
        format!("to here, from {}", peer.trim())
    } else {
        format!("of {} away from here, to {}", machine.trim(), peer.trim())
    };
    item.good(format!("{way}; its journal ends with {last}"));
    let next = match (over, records.is_empty(), incoming) {
        (true, _, _) => "it is over: nothing is done any more".to_string(),
        (_, true, _) => "nothing was written: nothing was begun".to_string(),
        (_, _, true) => destination_next(records, peer.trim()),
        (_, _, false) => source_next(records, peer.trim()),
    };
    item.good(next);
    Move {
        over,
        outgoing: !incoming,
        granted,
    }
}

fn source_next(records: &[Record], peer: &str) -> String {
    let (source, _) = Source::recover(records);
    match source.phase() {
        Phase::Grant | Phase::Drain if source.is_asking_back() => format!(
            "a daemon would ask {peer} on for the machine back, and run it here once {peer} has ended its guest"
        ),
        Phase::Grant => format!(
            "a daemon would ask {peer} what became of the grant, with the guest stopped here: accepted, it would send on what is missing; refused, it would run the guest here"
        ),
        Phase::Drain => {
            format!("{peer} owns the machine; a daemon would send on what is missing there")
        }
        Phase::Complete => format!(
            "{peer} has all of it; a daemon would tell it so once more, and end the stopped QEMU here"
        ),
        Phase::Rewind => format!(
            "the machine is this host's again; a daemon would tell {peer} so whenever it is heard of"
        ),
        _ => "nothing was handed over: the machine is this host's, and a daemon would say so"
            .to_string(),
    }
}

fn destination_next(records: &[Record], peer: &str) -> String {
    let (destination, actions) = Destination::recover(records);
    match destination.phase() {
        Phase::Accept => {
            let asks = actions.contains(&Action::Inspect);
            debug_assert!(asks, "one that had accepted looks at its QEMU first");
            format!(
                "the machine is this host's; a daemon would ask QEMU whether its guest ran: if so it would fetch from {peer} what is missing, if surely not it would refuse the machine"
            )
        }
        Phase::Complete => "all of it is here; a daemon would put the records right".to_string(),
        Phase::Rewind => format!("{peer} has the machine back; a daemon would end its guest here"),
        _ => "it was not accepted; a daemon would refuse it and remove what was made".to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::migration::record::MigrationJournal;
    use whimbrel_engine::switchover::Epoch;

    const OWN: Epoch = Epoch(4);
    const OFFERED: Epoch = Epoch(5);

    fn id() -> MigrationId {
        "m-1".parse().expect("an id")
    }

    fn name(text: &str) -> Name {
        text.parse().expect("a name")
    }

    /// A host with a machine of one disk, and a migration of it to `b` with these records.
    fn directory(folder: &Path, ownership: Ownership, records: &[Record]) -> StateDir {
        let dir = StateDir::init(folder).expect("room");
        let spec: MachineSpec =
            toml::from_str("name = \"web1\"\nmemory = \"64MiB\"\n[[disk]]\nvolume = \"root\"\n")
                .expect("a description");
        let runtime = MachineRuntime {
            epoch: OWN,
            ownership,
            process: None,
        };
        dir.add_machine(&spec, &runtime).expect("room");
        let draft = dir.begin_volume(&name("root")).expect("room");
        std::fs::write(draft.data_path(), vec![0; 4096]).expect("room");
        let record = VolumeRecord::fresh(name("root"), 4096).expect("a record");
        draft.commit(&record).expect("room");
        let migration = dir.add_migration(&id()).expect("room");
        std::fs::write(migration.join("peer"), "b").expect("room");
        std::fs::write(migration.join("machine"), "web1").expect("room");
        let mut journal = MigrationJournal::open(&migration).expect("room");
        for &record in records {
            journal.append(record).expect("room");
        }
        dir
    }

    fn departed() -> Ownership {
        Ownership::Departed {
            migration: id(),
            to: "b".parse().expect("a name"),
        }
    }

    /// What is said of something, and how bad the worst of it is.
    async fn said_of(folder: &Path, what: &str) -> (FindingKind, String) {
        let all = explain(folder).await.expect("a state directory");
        let item = all.items.iter().find(|item| item.what == what);
        let findings = &item.expect("it is there").findings;
        let worst = findings.iter().map(|f| f.kind).max().expect("a finding");
        let said: Vec<_> = findings.iter().map(|f| f.what.clone()).collect();
        (worst, said.join("\n"))
    }

    #[tokio::test]
    async fn a_machine_in_the_drain_is_said_to_be_the_destinations() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let records = [
            Record::Started { epoch: OWN },
            Record::Granted { epoch: OFFERED },
            Record::PeerAccepted { epoch: OFFERED },
        ];
        directory(folder.path(), departed(), &records);
        let (worst, said) = said_of(folder.path(), "migration m-1").await;
        assert_eq!(worst, FindingKind::Good, "{said}");
        assert!(said.contains("b owns the machine"), "{said}");
        let (worst, _) = said_of(folder.path(), "machine web1").await;
        assert_eq!(worst, FindingKind::Good);
    }

    #[tokio::test]
    async fn a_machine_that_is_asked_back_is_said_to_be_so() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let records = [
            Record::Started { epoch: OWN },
            Record::Granted { epoch: OFFERED },
            Record::AskedBack { epoch: OFFERED },
        ];
        directory(folder.path(), departed(), &records);
        let (_, said) = said_of(folder.path(), "migration m-1").await;
        assert!(said.contains("ask b on for the machine back"), "{said}");
    }

    #[tokio::test]
    async fn a_departed_machine_without_a_grant_is_untidy() {
        let folder = tempfile::tempdir().expect("temporary folder");
        directory(folder.path(), departed(), &[Record::Started { epoch: OWN }]);
        let (worst, said) = said_of(folder.path(), "machine web1").await;
        assert_eq!(worst, FindingKind::Untidy, "{said}");
    }

    #[tokio::test]
    async fn a_damaged_journal_is_broken_and_everything_else_is_still_explained() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let records = [
            Record::Started { epoch: OWN },
            Record::Granted { epoch: OFFERED },
        ];
        let dir = directory(folder.path(), departed(), &records);
        let path = dir.migration_folder(&id()).join("journal");
        let text = std::fs::read_to_string(&path).expect("a journal");
        std::fs::write(&path, text.replace("started", "staated")).expect("room");
        let (worst, said) = said_of(folder.path(), "migration m-1").await;
        assert_eq!(worst, FindingKind::Broken, "{said}");
        said_of(folder.path(), "machine web1").await;
    }

    #[tokio::test]
    async fn a_volume_without_its_data_is_broken() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let dir = directory(folder.path(), Ownership::Local, &[]);
        let data = dir.volume_folder(&name("root")).join("data");
        std::fs::remove_file(data).expect("it was there");
        let (worst, _) = said_of(folder.path(), "volume root").await;
        assert_eq!(worst, FindingKind::Broken);
    }

    #[tokio::test]
    async fn what_is_no_state_directory_is_refused() {
        let folder = tempfile::tempdir().expect("temporary folder");
        assert!(explain(folder.path()).await.is_err());
    }
}
