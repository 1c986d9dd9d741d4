//! A daemon made of memory, for tests of the router and of the command. It moves nothing.
//!
//! It knows one machine (`web1`), one volume (`root`) and one peer (`b`). Whatever else it is asked for it
//! does not have. A migration shows the views it was given, in order.

mod timeline;

use super::error::{ApiError, ErrorCode};
use super::service::Service;
use super::types::*;
use crate::state::{
    Accel, MachineSpec, MigrationId, Name, Ownership, RateLimit, Timestamp, VolumeUuid,
};
use std::path::PathBuf;
use std::sync::Mutex;
use tokio::sync::watch;
use whimbrel_engine::space::SpaceKind;
use whimbrel_engine::switchover::{Epoch, Phase};
use whimbrel_peer::invitation::{InvitationId, InvitationState};
use whimbrel_peer::rights::Rights;
use whimbrel_peer::trust::PeerName;

pub use self::timeline::{sample_report, sample_timeline};

/// See the module.
#[derive(Debug)]
pub struct FakeService {
    migration: watch::Sender<MigrationView>,
    /// What a migration shows after it started.
    script: Mutex<Vec<MigrationView>>,
    /// What was asked of it, one line each.
    calls: Mutex<Vec<String>>,
}

fn called<T: std::str::FromStr<Err: std::fmt::Debug>>(text: &str) -> T {
    text.parse().expect("the fake's own words are well formed")
}

/// A migration of `web1` to `b` that just started.
pub fn sample_migration() -> MigrationView {
    let space = |name: &str, kind, units| SpaceProgress {
        name: name.to_string(),
        kind,
        units_total: units,
        units_live: units / 2,
        units_resident: 0,
        units_sent: 0,
        bytes_sent: 0,
    };
    MigrationView {
        id: called("m-1"),
        machine: called("web1"),
        peer: called("b"),
        direction: Direction::Outgoing,
        strategy: Strategy::Postcopy,
        phase: Phase::Prepare,
        state: MigrationState::Running,
        started: Timestamp::now(),
        ended: None,
        permille: 0,
        spaces: vec![
            space("pc.ram", SpaceKind::Ram, 131_072),
            space("root", SpaceKind::Disk, 262_144),
        ],
        sent: SentBytes::default(),
        codecs: CodecUnits::default(),
        compress: Compress::Auto,
        delta: Delta::On,
        deltas: DeltaStats::default(),
        bandwidth: RateLimit(None),
        rate: 0,
        eta: None,
        demands: DemandStats::default(),
        push_held_to: None,
        blackout_ms: None,
        link: LinkView {
            connected: true,
            since: Timestamp::now(),
            rtt_ms: Some(30.5),
            reconnects: 0,
            waiting_for: None,
        },
        messages: Vec::new(),
        error: None,
        report: None,
    }
}

/// `root`.
pub fn sample_volume() -> VolumeView {
    VolumeView {
        name: called("root"),
        uuid: VolumeUuid([7; 16]),
        size: 1 << 30,
        allocated: 300 << 20,
        resident_permille: 1000,
        epoch: Epoch(3),
        state: Ownership::Local,
        machine: Some(called("web1")),
        format: Format::Raw,
        awaits: false,
        export: None,
        data: PathBuf::from("/state/volumes/root/data"),
        created: Timestamp::now(),
    }
}

/// A map of `root`: data, holes, and something hot, in turn.
pub fn sample_map(cells: usize) -> MapView {
    let cell = (1u64 << 30).div_ceil(cells as u64);
    let kinds = [
        MapCell {
            data: cell,
            ..MapCell::default()
        },
        MapCell::default(),
        MapCell {
            data: cell,
            reads: 90,
            writes: 10,
            ..MapCell::default()
        },
        MapCell {
            absent: cell,
            ..MapCell::default()
        },
        MapCell {
            data: cell,
            written: cell,
            ..MapCell::default()
        },
    ];
    MapView {
        volume: called("root"),
        size: 1 << 30,
        cell,
        cells: kinds.iter().copied().cycle().take(cells).collect(),
        total: MapCell {
            data: 300 << 20,
            ..MapCell::default()
        },
    }
}

/// `web1`.
pub fn sample_machine() -> MachineView {
    MachineView {
        name: called("web1"),
        status: MachineStatus::Running,
        ownership: Ownership::Local,
        epoch: Epoch(3),
        pid: Some(4711),
        qmp: Some(PathBuf::from("/state/machines/web1/qmp.sock")),
        memory: 512 << 20,
        vcpus: 2,
        machine_type: "pc-q35-10.0".to_string(),
        accel: Accel::Tcg,
        disks: vec![DiskView {
            volume: called("root"),
            size: Some(1 << 30),
        }],
        nics: Vec::new(),
        paused_because: None,
        migration: Some(called("m-1")),
    }
}

fn sample_peer() -> PeerView {
    PeerView {
        name: called("b"),
        key: called(&format!("whk1-{}", "a".repeat(52))),
        addresses: vec![called("192.0.2.2:7420")],
        may: Rights::ALL,
        link: None,
    }
}

/// An invitation of host `oslo` at 192.0.2.1:7420; nobody has it.
pub const SAMPLE_TOKEN: &str = "whi1-aeaqcaibaeaqcaibaeaqcaibaeaqcaibaeaqcaibaeaqcaibaeaqci2fm6e2xtppaaaaaaaaaaaaaaaaaaaaaaaaaacg643mn4aqjqaaaiarz7atuzbqm";

fn sample_invitation() -> InvitationView {
    InvitationView {
        id: called("0123456789abcdef"),
        state: InvitationState::Open,
        expires: Timestamp::from_unix(4_000_000_000),
        called: None,
        may: Rights::ALL,
        wrong: 0,
        used_by: None,
    }
}

impl Default for FakeService {
    fn default() -> Self {
        Self::new()
    }
}

impl FakeService {
    pub fn new() -> FakeService {
        FakeService {
            migration: watch::Sender::new(sample_migration()),
            script: Mutex::default(),
            calls: Mutex::default(),
        }
    }

    /// What migrations show from now on, the last of it settled if anybody is to wait for the end.
    pub fn with_script(self, script: Vec<MigrationView>) -> FakeService {
        *self.script.lock().expect("nothing panics under it") = script;
        self
    }

    /// Shows a view to whoever watches.
    pub fn show(&self, view: MigrationView) {
        self.migration.send_replace(view);
    }

    /// How many follow the migration now.
    pub fn watchers(&self) -> usize {
        self.migration.receiver_count()
    }

    /// What was asked so far.
    pub fn calls(&self) -> Vec<String> {
        self.calls.lock().expect("nothing panics under it").clone()
    }

    fn note(&self, call: String) {
        self.calls
            .lock()
            .expect("nothing panics under it")
            .push(call);
    }

    fn known<T>(&self, name: &str, known: &str, view: T) -> Result<T, ApiError> {
        if name == known {
            return Ok(view);
        }
        Err(ApiError::new(
            ErrorCode::NotFound,
            format!("there is no `{name}` on this host"),
        )
        .machine_state("nothing was changed")
        .next_step("list what there is"))
    }
}

impl Service for FakeService {
    async fn host(&self) -> Result<HostView, ApiError> {
        Ok(HostView {
            name: called("a"),
            key: sample_peer().key,
            listen: "0.0.0.0:7420".to_string(),
            version: env!("CARGO_PKG_VERSION").to_string(),
            state_dir: PathBuf::from("/state"),
            daemon: Some(DaemonView {
                pid: 1,
                started: Timestamp::now(),
                qemu: PathBuf::from("qemu-system-x86_64"),
                networks: vec![called("lan")],
                bandwidth: RateLimit(None),
                machines: 1,
                volumes: 1,
                migrations: 0,
            }),
            peers: vec![sample_peer()],
        })
    }

    async fn peers(&self) -> Result<Listed<PeerView>, ApiError> {
        Ok(Listed {
            items: vec![sample_peer()],
            damaged: Vec::new(),
        })
    }

    async fn trust(&self, request: TrustRequest) -> Result<PeerView, ApiError> {
        self.note(format!("trust {}", request.name));
        let TrustRequest {
            name,
            key,
            addresses,
            may,
        } = request;
        Ok(PeerView {
            name,
            key,
            addresses,
            may: may.unwrap_or_default(),
            link: None,
        })
    }

    async fn revoke(&self, name: PeerName, force: bool) -> Result<(), ApiError> {
        self.note(format!("revoke {name} force={force}"));
        self.known(name.as_str(), "b", ())
    }

    async fn rename_peer(&self, name: PeerName, new: PeerName) -> Result<PeerView, ApiError> {
        self.note(format!("rename {name} {new}"));
        let renamed = PeerView {
            name: new,
            ..sample_peer()
        };
        self.known(name.as_str(), "b", renamed)
    }

    async fn allow_peer(&self, name: PeerName, change: AllowPeer) -> Result<PeerView, ApiError> {
        let may = change.over(Rights::ALL);
        self.note(format!("allow {name} {may}"));
        let changed = PeerView {
            may,
            ..sample_peer()
        };
        self.known(name.as_str(), "b", changed)
    }

    async fn invitations(&self) -> Result<Listed<InvitationView>, ApiError> {
        Ok(Listed {
            items: vec![sample_invitation()],
            damaged: Vec::new(),
        })
    }

    async fn invite(&self, request: InviteRequest) -> Result<InviteView, ApiError> {
        self.note(format!("invite {} s", request.expires_s));
        Ok(InviteView {
            token: called(SAMPLE_TOKEN),
            name: called("a"),
            key: sample_peer().key,
            addresses: sample_peer().addresses,
            invitation: sample_invitation(),
            daemon: true,
        })
    }

    async fn cancel_invitation(&self, id: InvitationId) -> Result<InvitationView, ApiError> {
        self.note(format!("cancel invitation {id}"));
        let cancelled = InvitationView {
            state: InvitationState::Cancelled,
            ..sample_invitation()
        };
        let known = sample_invitation().id.to_string();
        self.known(&id.to_string(), &known, cancelled)
    }

    async fn join_host(&self, request: JoinHost) -> Result<JoinView, ApiError> {
        self.note(format!("join {}", request.token.name));
        Ok(JoinView {
            peer: sample_peer(),
            name_there: called("a"),
        })
    }

    async fn volumes(&self) -> Result<Listed<VolumeView>, ApiError> {
        let broken = ApiError::new(ErrorCode::Damaged, "volumes/old/volume.toml is damaged");
        Ok(Listed {
            items: vec![sample_volume()],
            damaged: vec![broken],
        })
    }

    async fn volume(&self, name: Name) -> Result<VolumeView, ApiError> {
        self.known(name.as_str(), "root", sample_volume())
    }

    async fn create_volume(&self, request: CreateVolume) -> Result<VolumeView, ApiError> {
        let size = request.size.unwrap_or(crate::state::ByteSize(1 << 30));
        self.note(format!("create {} {size}", request.name));
        if request.name.as_str() == "root" {
            return Err(ApiError::new(
                ErrorCode::Exists,
                "there is already a volume `root` on this host",
            ));
        }
        Ok(VolumeView {
            name: request.name,
            size: size.0,
            format: request.format,
            awaits: request.awaits,
            ..sample_volume()
        })
    }

    /// Imports anything but a file called `broken`; `endless` never ends.
    async fn import_volume(
        &self,
        request: ImportVolume,
        progress: watch::Sender<ImportProgress>,
    ) -> Result<VolumeView, ApiError> {
        let from = match (&request.file, &request.uri) {
            (Some(file), _) => file.display().to_string(),
            (None, uri) => uri.clone().unwrap_or_default(),
        };
        self.note(format!("import {} {from}", request.name));
        progress.send_replace(ImportProgress {
            done: 1 << 20,
            total: 2 << 20,
        });
        match from.rsplit('/').next() {
            Some("broken") => Err(ApiError::new(ErrorCode::Io, "cannot read the image")),
            Some("endless") => {
                let _gone = NoteOnDrop(self);
                std::future::pending().await
            }
            _ => Ok(VolumeView {
                name: request.name,
                size: 2 << 20,
                ..sample_volume()
            }),
        }
    }

    async fn export_volume(
        &self,
        name: Name,
        request: ExportVolume,
        progress: watch::Sender<ImportProgress>,
    ) -> Result<VolumeView, ApiError> {
        self.note(format!("export {name} {}", request.file.display()));
        progress.send_replace(ImportProgress { done: 1, total: 1 });
        self.known(name.as_str(), "root", sample_volume())
    }

    async fn clone_volume(
        &self,
        name: Name,
        request: CloneVolume,
        progress: watch::Sender<ImportProgress>,
    ) -> Result<VolumeView, ApiError> {
        self.note(format!("clone {name} {}", request.name));
        progress.send_replace(ImportProgress { done: 1, total: 1 });
        let view = VolumeView {
            name: request.name,
            ..sample_volume()
        };
        self.known(name.as_str(), "root", view)
    }

    async fn serve_volume(
        &self,
        name: Name,
        request: ServeVolume,
        progress: watch::Sender<ImportProgress>,
    ) -> Result<VolumeView, ApiError> {
        self.note(format!("serve {name} {}", request.address));
        progress.send_replace(ImportProgress { done: 0, total: 1 });
        self.known(name.as_str(), "root", sample_volume())
    }

    async fn record_trace(
        &self,
        name: Name,
        request: RecordTrace,
        progress: watch::Sender<RecordingProgress>,
    ) -> Result<RecordingView, ApiError> {
        self.note(format!("record {name} {:?}", request.for_ms));
        let came_to = RecordingProgress {
            requests: 1200,
            lost: 0,
            bytes: 9000,
            elapsed_ms: 2000,
        };
        progress.send_replace(came_to);
        let view = RecordingView {
            volume: called("root"),
            file: request.file,
            came_to,
            ended: RecordingEnd::Time,
        };
        self.known(name.as_str(), "web1", view)
    }

    async fn end_recording(&self, name: Name) -> Result<(), ApiError> {
        self.note(format!("end recording {name}"));
        self.known(name.as_str(), "web1", ())
    }

    async fn resize_volume(
        &self,
        name: Name,
        request: ResizeVolume,
    ) -> Result<VolumeView, ApiError> {
        self.note(format!("resize {name} {}", request.size));
        let view = VolumeView {
            size: request.size.0,
            ..sample_volume()
        };
        self.known(name.as_str(), "root", view)
    }

    async fn check_volume(&self, name: Name, request: CheckVolume) -> Result<CheckView, ApiError> {
        self.note(format!("check {name} {}", request.repair));
        let view = CheckView {
            volume: name.clone(),
            verdict: FindingKind::Good,
            findings: vec![Finding {
                what: "the data file opens and has its size".to_string(),
                kind: FindingKind::Good,
                next_step: None,
            }],
        };
        self.known(name.as_str(), "root", view)
    }

    async fn map_volume(&self, name: Name, cells: usize) -> Result<MapView, ApiError> {
        self.known(name.as_str(), "root", sample_map(cells))
    }

    async fn heat_volume(&self, name: Name, top: usize) -> Result<HeatView, ApiError> {
        let extent = HeatExtent {
            offset: 3 << 20,
            len: 1 << 20,
            reads: 17,
            writes: 4,
        };
        let view = HeatView {
            volume: name.clone(),
            half_life_s: 900,
            extents_used: 1,
            reads: 17,
            writes: 4,
            hottest: std::iter::repeat_n(extent, top.min(1)).collect(),
        };
        self.known(name.as_str(), "root", view)
    }

    async fn remove_volume(&self, name: Name) -> Result<(), ApiError> {
        self.note(format!("remove {name}"));
        self.known(name.as_str(), "root", ())
    }

    async fn machines(&self) -> Result<Listed<MachineView>, ApiError> {
        Ok(Listed {
            items: vec![sample_machine()],
            damaged: Vec::new(),
        })
    }

    async fn machine(&self, name: Name) -> Result<MachineView, ApiError> {
        self.known(name.as_str(), "web1", sample_machine())
    }

    async fn define_machine(&self, spec: MachineSpec) -> Result<MachineView, ApiError> {
        self.note(format!("define {}", spec.name));
        Ok(MachineView {
            name: spec.name,
            status: MachineStatus::Defined,
            memory: spec.memory.0,
            pid: None,
            qmp: None,
            migration: None,
            ..sample_machine()
        })
    }

    async fn start_machine(&self, name: Name) -> Result<MachineView, ApiError> {
        self.note(format!("start {name}"));
        self.known(name.as_str(), "web1", sample_machine())
    }

    async fn stop_machine(
        &self,
        name: Name,
        request: StopRequest,
    ) -> Result<MachineView, ApiError> {
        self.note(format!("stop {name} force={}", request.force));
        let stopped = MachineView {
            status: MachineStatus::Defined,
            pid: None,
            ..sample_machine()
        };
        self.known(name.as_str(), "web1", stopped)
    }

    async fn create_snapshot(
        &self,
        machine: Name,
        request: CreateSnapshot,
        progress: watch::Sender<ImportProgress>,
    ) -> Result<SnapshotView, ApiError> {
        self.note(format!(
            "snapshot {machine} {}",
            request.repository.display()
        ));
        progress.send_replace(ImportProgress { done: 1, total: 2 });
        let view = SnapshotView {
            name: request.name.unwrap_or_else(|| called("web1-first")),
            machine: machine.clone(),
            repository: request.repository,
            taken: Timestamp::now(),
            consistency: whimbrel_repository::Consistency::Crash,
            parent: None,
            pause_us: 850,
            took_ms: 1200,
            volumes: vec![SnapshotVolumeView {
                name: "root".to_string(),
                size: 1 << 30,
                looked_at: 1 << 30,
                whole_because: Some("there is no earlier one".to_string()),
            }],
            stored_bytes: 5 << 20,
            put_aside_bytes: 0,
        };
        self.known(machine.as_str(), "web1", view)
    }

    async fn resume_machine(&self, name: Name) -> Result<MachineView, ApiError> {
        self.note(format!("resume {name}"));
        self.known(name.as_str(), "web1", sample_machine())
    }

    async fn recovery(&self, name: Name) -> Result<RecoveryView, ApiError> {
        let view = self.migration.borrow().clone();
        let recovery = RecoveryView {
            machine: view.machine,
            migration: view.id,
            peer: view.peer,
            direction: view.direction,
            phase: view.phase,
            state: view.state,
            epoch: sample_machine().epoch,
            recorded: "peer-accepted under epoch 5".to_string(),
            recorded_at: Some(view.started),
            guest: GuestHere::Paused,
            link: view.link,
            absent: 1 << 20,
            choices: vec![RecoveryChoice {
                what: "wait".to_string(),
                command: None,
                gives_up: "nothing".to_string(),
            }],
        };
        self.known(name.as_str(), "web1", recovery)
    }

    async fn recover(
        &self,
        name: Name,
        request: RecoverRequest,
    ) -> Result<MigrationView, ApiError> {
        self.note(format!("recover {name} lost={:?}", request.lost));
        let view = self.migration.borrow().clone();
        self.known(name.as_str(), "web1", view)
    }

    async fn adopt_machine(&self, request: AdoptRequest) -> Result<MachineView, ApiError> {
        self.note(format!(
            "adopt {} {}",
            request.spec.name,
            request.qmp.display()
        ));
        Ok(MachineView {
            name: request.spec.name,
            ..sample_machine()
        })
    }

    async fn undefine_machine(&self, name: Name) -> Result<(), ApiError> {
        self.note(format!("undefine {name}"));
        self.known(name.as_str(), "web1", ())
    }

    async fn migrations(&self) -> Result<Listed<MigrationView>, ApiError> {
        Ok(Listed {
            items: vec![self.migration.borrow().clone()],
            damaged: Vec::new(),
        })
    }

    async fn migration(&self, id: MigrationId) -> Result<MigrationView, ApiError> {
        let view = self.migration.borrow().clone();
        self.known(id.as_str(), "m-1", view)
    }

    async fn migrate(&self, request: MigrateRequest) -> Result<MigrationView, ApiError> {
        self.note(format!(
            "migrate {} {} {} hold={} {:?}",
            request.machine, request.to, request.bandwidth, request.hold, request.ram
        ));
        self.known(request.to.as_str(), "b", ())?;
        let first = sample_migration();
        self.migration.send_replace(first.clone());
        let script = self.script.lock().expect("nothing panics under it").clone();
        let shown = self.migration.clone();
        tokio::spawn(async move {
            for view in script {
                tokio::task::yield_now().await;
                shown.send_replace(view);
            }
        });
        Ok(first)
    }

    async fn switch(&self, machine: Name) -> Result<MigrationView, ApiError> {
        self.note(format!("switch {machine}"));
        let view = self.migration.borrow().clone();
        self.known(machine.as_str(), "web1", view)
    }

    async fn cancel(&self, machine: Name) -> Result<MigrationView, ApiError> {
        self.note(format!("cancel {machine}"));
        let view = self.migration.borrow().clone();
        self.known(machine.as_str(), "web1", view)
    }

    async fn throttle(
        &self,
        machine: Name,
        bandwidth: RateLimit,
    ) -> Result<MigrationView, ApiError> {
        self.note(format!("throttle {machine} {bandwidth}"));
        let view = MigrationView {
            bandwidth,
            ..self.migration.borrow().clone()
        };
        self.known(machine.as_str(), "web1", view)
    }

    async fn reports(&self) -> Result<Listed<ReportEntry>, ApiError> {
        let view = self.migration.borrow().clone();
        Ok(Listed {
            items: vec![ReportEntry::from(&view)],
            damaged: Vec::new(),
        })
    }

    async fn report(&self, id: MigrationId) -> Result<ReportView, ApiError> {
        self.known(id.as_str(), "m-1", sample_report())
    }

    async fn watch(&self, id: MigrationId) -> Result<watch::Receiver<MigrationView>, ApiError> {
        self.known(id.as_str(), "m-1", self.migration.subscribe())
    }
}

/// Notes that an import was given up.
struct NoteOnDrop<'a>(&'a FakeService);

impl Drop for NoteOnDrop<'_> {
    fn drop(&mut self) {
        self.0.note("import given up".to_string());
    }
}
