//! How machines, volumes and migrations are shown.

use whimbrel_engine::switchover::Phase;
use whimbrel_peer::trust::PeerName;

use super::paused;
use crate::api::types::*;
use crate::daemon::Daemon;
use crate::machines::{Machine, Standing};
use crate::state::{MigrationId, Name, Ownership, RateLimit, Timestamp, VolumeRecord};
use whimbrel_volume::backend::Format;

/// What is told of a migration that has just begun.
pub fn first_view(
    id: MigrationId,
    machine: Name,
    peer: PeerName,
    direction: Direction,
) -> MigrationView {
    MigrationView {
        id,
        machine,
        peer,
        direction,
        strategy: Strategy::Postcopy,
        phase: Phase::Prepare,
        state: MigrationState::Running,
        started: Timestamp::now(),
        ended: None,
        permille: 0,
        spaces: Vec::new(),
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
            rtt_ms: None,
            reconnects: 0,
            waiting_for: None,
        },
        messages: Vec::new(),
        error: None,
        report: None,
    }
}

impl Daemon {
    pub async fn machine_view(&self, machine: &Machine) -> MachineView {
        let standing = machine.lock().await;
        let status = status_of(&standing).await;
        let process = standing.running.as_ref().map(|r| &r.process);
        MachineView {
            name: standing.spec.name.clone(),
            status,
            ownership: standing.runtime.ownership.clone(),
            epoch: standing.runtime.epoch,
            pid: process.map(|p| p.pid),
            qmp: process.map(|p| p.qmp.clone()),
            memory: standing.spec.memory.bytes(),
            vcpus: standing.spec.vcpus,
            machine_type: process.map_or_else(
                || standing.spec.machine_type.clone(),
                |p| p.machine_type.clone(),
            ),
            accel: standing.spec.accel,
            disks: standing
                .spec
                .disks
                .iter()
                .map(|disk| DiskView {
                    volume: disk.volume.clone(),
                    size: self.host.state.volume(&disk.volume).ok().map(|v| v.size),
                })
                .collect(),
            nics: standing
                .spec
                .nics
                .iter()
                .enumerate()
                .map(|(n, nic)| NicView {
                    network: nic.network.clone(),
                    mac: nic.mac,
                    interface: standing
                        .running
                        .as_ref()
                        .and_then(|r| r.interface(n))
                        .map(str::to_string),
                })
                .collect(),
            paused_because: paused::reason(&standing).await,
            migration: standing.migration.clone(),
        }
    }

    pub async fn volume_view(&self, record: VolumeRecord) -> VolumeView {
        let folder = self.host.state.volume_folder(&record.name);
        let data = record.data_path(&folder);
        let allocated = match record.format {
            Format::Device => record.size,
            Format::Raw | Format::Qcow2 => std::fs::metadata(&data)
                .map(|m| std::os::unix::fs::MetadataExt::blocks(&m) * 512)
                .unwrap_or(0),
        };
        let mut export = None;
        let mut resident_permille = 1000;
        if let Some(machine) = record.machine.as_ref().and_then(|m| self.machines.get(m)) {
            let standing = machine.lock().await;
            if let Some(running) = &standing.running {
                export = Some(format!(
                    "nbd+unix:///{}?socket={}",
                    record.name,
                    running.disk_socket().display()
                ));
                for disk in &running.disks {
                    if disk.name() == record.name.as_str()
                        && let Some(filling) = disk.filling().await
                    {
                        let units = filling.units().max(1);
                        resident_permille = (filling.resident() * 1000 / units) as u16;
                    }
                }
            }
        }
        VolumeView {
            name: record.name,
            uuid: record.uuid,
            size: record.size,
            allocated,
            resident_permille,
            epoch: record.epoch,
            state: record.state,
            machine: record.machine,
            format: record.format,
            awaits: record.awaits,
            export,
            data,
            created: record.created,
        }
    }
}

async fn status_of(standing: &Standing) -> MachineStatus {
    match (&standing.runtime.ownership, &standing.running) {
        (Ownership::Departed { .. }, _) => MachineStatus::Departed,
        (_, Some(running)) if running.has_ended() => MachineStatus::Crashed,
        (_, Some(running)) => {
            let status = paused::ask(running, "query-status").await;
            match status.and_then(|s| s["running"].as_bool()) {
                Some(true) => MachineStatus::Running,
                _ => MachineStatus::Paused,
            }
        }
        (Ownership::Arriving { .. }, None) => MachineStatus::Arriving,
        (Ownership::Local, None) if standing.runtime.process.is_some() => MachineStatus::Crashed,
        (Ownership::Local, None) => MachineStatus::Defined,
    }
}
