//! Starting a machine's QEMU, taking one over, and finding one again after a daemon's restart.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use whimbrel_qemu::info::{Info, info};
use whimbrel_qemu::launch::{
    Bus as DriveBus, Drive, Firmware, Kernel, LaunchSpec, Memory, Nic, OnError, Probe,
};
use whimbrel_qemu::qmp::Qmp;
use whimbrel_qemu::source::release;

use super::{
    DiskServer, MachineError, Running, Tap, check_socket, disk_socket, qmp_socket, ram_out_socket,
};
use crate::config::Config;
use crate::disk::Disk;
use crate::state::{
    Accel, Bus, MachineSpec, MemoryBacking, OnDiskError, QemuProcess, Timestamp, start_ticks,
};

/// Seconds for which QEMU holds a guest's disk requests while the daemon is away: an hour, after which
/// they fail, and the machine's policy for disk errors pauses the guest or tells it.
const RECONNECT_DELAY: u32 = 3600;

/// How long a monitor that must be there is tried.
const MONITOR_PATIENCE: Duration = Duration::from_secs(10);

/// How long one found again that has a lifeline is waited for.
const MONITOR_ANSWER: Duration = Duration::from_secs(2);

/// What a machine is started for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Boot<'a> {
    /// The guest boots.
    Fresh,
    /// QEMU waits for a machine of this concrete type to arrive.
    Incoming { machine_type: &'a str },
}

/// What this host's QEMU is and can do.
pub async fn probe(config: &Config) -> Result<Probe, MachineError> {
    Ok(whimbrel_qemu::launch::probe(&config.qemu).await?)
}

/// The name of disk `n` inside QEMU.
pub fn drive_name(n: usize) -> String {
    format!("disk{n}")
}

fn accel_and_cpu(spec: &MachineSpec) -> (Vec<String>, String) {
    let has_kvm = Path::new("/dev/kvm").exists();
    let accel: &[&str] = match spec.accel {
        Accel::Kvm => &["kvm"],
        Accel::Tcg => &["tcg"],
        Accel::Auto if has_kvm => &["kvm", "tcg"],
        Accel::Auto => &["tcg"],
    };
    // A model that both accelerators and every host of the last decade have: the guest's CPU must not
    // change under it when it moves.
    let cpu = spec.cpu.clone().unwrap_or_else(|| "qemu64".to_string());
    (accel.iter().map(ToString::to_string).collect(), cpu)
}

/// What the machine's QEMUs write, one after the other.
pub fn qemu_log(folder: &Path) -> PathBuf {
    folder.join("qemu.log")
}

/// Starts a machine's QEMU in `folder`, its disks already opened.
pub async fn start(
    config: &Config,
    folder: &Path,
    spec: &MachineSpec,
    disks: Vec<Arc<Disk>>,
    boot: Boot<'_>,
) -> Result<Running, MachineError> {
    let probe = probe(config).await?;
    let (wanted, incoming) = match boot {
        Boot::Fresh => (spec.machine_type.as_str(), false),
        Boot::Incoming { machine_type } => (machine_type, true),
    };
    let machine_type = probe.concrete(wanted)?.to_string();
    let server = DiskServer::start(&disk_socket(folder), &disks)?;
    let taps = make_taps(config, spec)?;
    let qmp_path = qmp_socket(folder);
    check_socket(&qmp_path)?;
    // Left by a QEMU that died.
    let _ = std::fs::remove_file(&qmp_path);
    let launch = launch_spec(
        config,
        folder,
        spec,
        &machine_type,
        &server,
        &taps,
        incoming,
    );
    let launched = launch.spawn(&qemu_log(folder))?;
    let qmp = match launched.connect().await {
        Ok(qmp) => qmp,
        Err(error) => {
            end(launched.pid);
            return Err(error.into());
        }
    };
    let lifeline = match launched.lifeline().await {
        Ok(lifeline) => Some(lifeline),
        Err(error) => {
            end(launched.pid);
            return Err(error.into());
        }
    };
    let pid = launched.pid;
    Ok(Running {
        spec: spec.clone(),
        process: QemuProcess {
            pid,
            start_ticks: start_ticks(pid).ok_or(MachineError::Gone { pid })?,
            qmp: qmp_path,
            machine_type,
            adopted: false,
            started: Timestamp::now(),
        },
        qmp,
        _lifeline: lifeline,
        disks,
        server,
        taps,
        launched: Some(launched),
    })
}

/// A QEMU that started and is of no use.
fn end(pid: u32) {
    if let Some(pid) = i32::try_from(pid)
        .ok()
        .and_then(rustix::process::Pid::from_raw)
    {
        // Gone already, as a rule.
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
    }
}

fn make_taps(config: &Config, spec: &MachineSpec) -> Result<Vec<Tap>, MachineError> {
    spec.nics
        .iter()
        .enumerate()
        .map(|(card, nic)| {
            let bridge =
                config
                    .networks
                    .get(&nic.network)
                    .ok_or_else(|| MachineError::NoNetwork {
                        machine: spec.name.to_string(),
                        network: nic.network.to_string(),
                    })?;
            Ok(Tap::create(
                &Tap::name_of(spec.name.as_str(), card),
                bridge,
            )?)
        })
        .collect()
}

fn launch_spec(
    config: &Config,
    folder: &Path,
    spec: &MachineSpec,
    machine_type: &str,
    server: &DiskServer,
    taps: &[Tap],
    incoming: bool,
) -> LaunchSpec {
    let (accel, cpu) = accel_and_cpu(spec);
    let in_flash = spec.disks.iter().any(|disk| disk.bus == Bus::Flash);
    let firmware = spec.firmware.clone().map(|image| match in_flash {
        true => Firmware::Flash(image),
        false => Firmware::Bios(image),
    });
    LaunchSpec {
        binary: config.qemu.clone(),
        name: spec.name.to_string(),
        machine: machine_type.to_string(),
        cpu,
        memory_bytes: spec.memory.bytes(),
        memory: match spec.memory_backing {
            MemoryBacking::Private => Memory::Private,
            MemoryBacking::Shared => Memory::Shared,
            MemoryBacking::Huge => Memory::Huge,
        },
        vcpus: spec.vcpus,
        firmware,
        accel,
        kernel: spec.kernel.as_ref().map(|image| Kernel {
            image: image.clone(),
            initrd: spec.initrd.clone(),
            append: spec.append.clone().unwrap_or_default(),
        }),
        drives: spec
            .disks
            .iter()
            .enumerate()
            .map(|(n, disk)| Drive {
                name: drive_name(n),
                socket: server.socket().to_path_buf(),
                export: disk.volume.to_string(),
                reconnect_delay: RECONNECT_DELAY,
                read_only: false,
                on_error: match spec.on_disk_error {
                    OnDiskError::Stop => OnError::Stop,
                    OnDiskError::Enospc => OnError::Enospc,
                    OnDiskError::Report => OnError::Report,
                },
                bus: match disk.bus {
                    Bus::VirtioBlk => DriveBus::VirtioBlk,
                    Bus::VirtioScsi => DriveBus::VirtioScsi,
                    Bus::Ide => DriveBus::Ide,
                    Bus::Flash => DriveBus::Flash,
                },
            })
            .collect(),
        nics: spec
            .nics
            .iter()
            .zip(taps)
            .enumerate()
            .map(|(n, (nic, tap))| Nic {
                name: format!("nic{n}"),
                ifname: tap.name().to_string(),
                // Defining a machine fills every address in.
                mac: nic.mac.map(|m| m.to_string()).unwrap_or_default(),
            })
            .collect(),
        serial: Some(folder.join("serial.log")),
        qmp: vec![qmp_socket(folder)],
        incoming,
        extra: spec
            .extra_args
            .iter()
            .map(std::ffi::OsString::from)
            .collect(),
    }
}

/// A QEMU that somebody else started.
pub struct Adoption<'a> {
    pub spec: &'a MachineSpec,
    pub qmp: &'a Path,
}

/// Takes over a running QEMU whose disks are attached to this machine's socket, or that has none.
///
/// The socket must be served for its disks to be there at all, so the caller opened them; what QEMU
/// really has is checked against the description.
pub async fn adopt(
    adoption: Adoption<'_>,
    disks: Vec<Arc<Disk>>,
    server: DiskServer,
) -> Result<Running, MachineError> {
    let Adoption { spec, qmp: path } = adoption;
    let qmp = Qmp::connect(path).await?;
    let found = info(&qmp).await?;
    check_adopted(spec, &found, server.socket())?;
    let pid = found
        .pid
        .and_then(|pid| u32::try_from(pid).ok())
        .unwrap_or_default();
    Ok(Running {
        spec: spec.clone(),
        process: QemuProcess {
            pid,
            start_ticks: start_ticks(pid).ok_or(MachineError::Gone { pid })?,
            qmp: path.to_path_buf(),
            machine_type: found.machine_type,
            adopted: true,
            started: Timestamp::now(),
        },
        qmp,
        _lifeline: None,
        disks,
        server,
        taps: Vec::new(),
        launched: None,
    })
}

fn check_adopted(spec: &MachineSpec, found: &Info, socket: &Path) -> Result<(), MachineError> {
    if found.memory_bytes != spec.memory.bytes() {
        return Err(MachineError::Mismatch {
            what: "memory of",
            found: format!("{} bytes", found.memory_bytes),
            expected: format!("{} bytes", spec.memory.bytes()),
        });
    }
    for disk in &spec.disks {
        let attached = found
            .nbd
            .iter()
            .any(|node| node.export == disk.volume.as_str() && node.socket == socket);
        if !attached {
            return Err(MachineError::DiskElsewhere {
                volume: disk.volume.to_string(),
                socket: socket.to_path_buf(),
            });
        }
    }
    Ok(())
}

/// Finds a machine's QEMU again after a daemon's restart: serves its disks, where QEMU reconnects, and
/// takes up its monitor.
pub async fn reattach(
    folder: &Path,
    spec: &MachineSpec,
    process: &QemuProcess,
    disks: Vec<Arc<Disk>>,
) -> Result<Running, MachineError> {
    if !process.is_alive() {
        return Err(MachineError::Gone { pid: process.pid });
    }
    let server = DiskServer::start(&disk_socket(folder), &disks)?;
    // First of all: one that waits for its hand-over to be read may answer nobody.
    match i32::try_from(process.pid).map(|pid| release(pid, &ram_out_socket(folder))) {
        Ok(Ok(0)) | Err(_) => {}
        Ok(Ok(_)) => {
            tracing::info!(machine = %spec.name, "a hand-over of memory that an earlier daemon left is ended");
        }
        Ok(Err(error)) => {
            tracing::warn!(machine = %spec.name, %error, "a hand-over of memory may be left open");
        }
    }
    let lifeline = lifeline_of(process);
    let connecting = Qmp::connect_patiently(&process.qmp, MONITOR_PATIENCE);
    let qmp = match &lifeline {
        None => connecting.await?,
        // It may be waiting for memory that only this daemon can bring it.
        Some(lifeline) => match tokio::time::timeout(MONITOR_ANSWER, connecting).await {
            Ok(qmp) => qmp?,
            Err(_) => lifeline.clone(),
        },
    };
    let taps = if process.adopted {
        Vec::new()
    } else {
        (0..spec.nics.len())
            .map(|card| Tap::existing(&Tap::name_of(spec.name.as_str(), card)))
            .collect()
    };
    Ok(Running {
        spec: spec.clone(),
        process: process.clone(),
        qmp,
        _lifeline: lifeline,
        disks,
        server,
        taps,
        launched: None,
    })
}

/// `None` for a QEMU that was started by someone else, or whose file table this daemon may not look into.
fn lifeline_of(process: &QemuProcess) -> Option<Qmp> {
    let pid = i32::try_from(process.pid).ok()?;
    Qmp::lifeline(pid).unwrap_or_else(|error| {
        tracing::warn!(%error, "should this QEMU wait for memory, it cannot be told where to get it");
        None
    })
}
