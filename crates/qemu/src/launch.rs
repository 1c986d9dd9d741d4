//! A QEMU's command line, and starting it.
//!
//! Both ends of a move start QEMU from the same [`LaunchSpec`], so what the guest sees is fixed here:
//! devices are given in the spec's order and QEMU numbers them in that order, network cards have no
//! boot ROM (a RAM block whose length would depend on the host's packages), nothing comes by default.
//!
//! The guest outlives the daemon: QEMU gets a session of its own and a log file for its output, and no
//! pipe to us. It stays the daemon's child while the daemon lives (so its end is seen) and is handed to
//! init when the daemon goes; afterwards it is found again by its monitor's socket.

use std::ffi::OsString;
use std::io::{Read, Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use serde_json::json;
use tokio::sync::watch;

use crate::lifeline::Lifeline;
use crate::qmp::{Qmp, Version};
use crate::source::within;
use crate::{Error, Result};

/// The oldest QEMU whose stream was tried.
pub const OLDEST: (u64, u64) = (7, 2);
/// Time a QEMU gets to start, to tell its machine types and to exit.
const PATIENCE: Duration = Duration::from_secs(20);
/// The object that is the guest's memory, and its RAM block.
const RAM: &str = "pc.ram";
/// The virtio-scsi controller.
const SCSI: &str = "scsi0";
/// Node of the firmware in flash.
const FIRMWARE: &str = "firmware";
const HUGE_PAGE: u64 = 2 << 20;
/// Bytes of a log's end carried in an error.
const LOG_TAIL: u64 = 4096;

/// A disk: an NBD export of the daemon over a unix socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Drive {
    /// Node name of the disk (`disk0`); the device is `virtio-` and it, the NBD node it and `-nbd`.
    pub name: String,
    pub socket: PathBuf,
    pub export: String,
    /// Seconds QEMU holds requests while the daemon is away, before they fail.
    pub reconnect_delay: u32,
    pub read_only: bool,
    pub on_error: OnError,
    pub bus: Bus,
}

/// How a disk is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bus {
    VirtioBlk,
    /// On one virtio-scsi controller, which is made where the first of them stands.
    VirtioScsi,
    /// On the chipset's own controller.
    Ide,
    /// The flash beside the firmware's; no disk.
    Flash,
}

/// What the guest's memory is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Memory {
    Private,
    /// A memfd.
    Shared,
    /// A memfd of huge pages of 2 MiB.
    Huge,
}

/// What the guest boots by, in place of QEMU's own firmware.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Firmware {
    Bios(PathBuf),
    /// In flash that the guest cannot write to.
    Flash(PathBuf),
}

/// What QEMU does when a disk fails a guest's request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnError {
    /// Pauses the guest; its request is made again when it is resumed.
    Stop,
    /// Pauses it if room is lacking, reports everything else to it.
    Enospc,
    /// Tells the guest.
    Report,
}

impl OnError {
    /// QEMU's `werror` and `rerror`.
    fn words(self) -> (&'static str, &'static str) {
        match self {
            OnError::Stop => ("stop", "stop"),
            OnError::Enospc => ("enospc", "report"),
            OnError::Report => ("report", "report"),
        }
    }
}

/// A network card: virtio on an existing TAP device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Nic {
    /// Name of the card (`nic0`).
    pub name: String,
    pub ifname: String,
    pub mac: String,
}

/// Direct boot of a kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kernel {
    pub image: PathBuf,
    pub initrd: Option<PathBuf>,
    pub append: String,
}

/// Everything a QEMU is started with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LaunchSpec {
    pub binary: PathBuf,
    /// The guest's name, shown in process lists.
    pub name: String,
    /// Concrete machine type (`pc-q35-10.0`, see [`Probe::concrete`]) with options, as QEMU takes it.
    pub machine: String,
    /// CPU model with features, as QEMU takes it. Must exist on both hosts: not `host`.
    pub cpu: String,
    pub memory_bytes: u64,
    pub memory: Memory,
    pub vcpus: u32,
    pub firmware: Option<Firmware>,
    /// Accelerators in order of preference (`kvm`, `tcg`).
    pub accel: Vec<String>,
    pub kernel: Option<Kernel>,
    pub drives: Vec<Drive>,
    pub nics: Vec<Nic>,
    /// File that takes the serial console's output.
    pub serial: Option<PathBuf>,
    /// Monitor sockets; each serves one client at a time.
    pub qmp: Vec<PathBuf>,
    /// Wait for a migration (`-incoming defer`) instead of booting.
    pub incoming: bool,
    /// Arguments appended as they are.
    pub extra: Vec<OsString>,
}

impl LaunchSpec {
    /// QEMU's arguments, the binary not included.
    pub fn args(&self) -> Vec<OsString> {
        let mut args = Args(Vec::new());
        for flag in ["-nodefaults", "-no-user-config"] {
            args.0.push(flag.into());
        }
        args.add("-display", "none");
        args.add("-name", format!("guest={}", escape(&self.name)));
        args.add("-machine", self.machine_options());
        for accel in &self.accel {
            args.add("-accel", accel);
        }
        args.add("-cpu", &self.cpu);
        args.add("-m", format!("size={}B", self.memory_bytes));
        self.add_memory(&mut args);
        args.add("-smp", self.vcpus.to_string());
        if let Some(kernel) = &self.kernel {
            args.add("-kernel", &kernel.image);
            if let Some(initrd) = &kernel.initrd {
                args.add("-initrd", initrd);
            }
            args.add("-append", &kernel.append);
        }
        match &self.firmware {
            Some(Firmware::Bios(path)) => args.add("-bios", path),
            Some(Firmware::Flash(path)) => args.add("-blockdev", firmware_node(path)),
            None => {}
        }
        let scsi = self.drives.iter().position(|d| d.bus == Bus::VirtioScsi);
        for (n, drive) in self.drives.iter().enumerate() {
            if scsi == Some(n) {
                let controller = json!({ "driver": "virtio-scsi-pci", "id": SCSI });
                args.add("-device", controller.to_string());
            }
            drive.add(&mut args);
        }
        for nic in &self.nics {
            nic.add(&mut args);
        }
        if let Some(serial) = &self.serial {
            let path = escape(&serial.to_string_lossy());
            args.add("-chardev", format!("file,id=serial0,path={path},append=on"));
            args.add("-serial", "chardev:serial0");
        }
        for (index, path) in self.qmp.iter().enumerate() {
            let path = escape(&path.to_string_lossy());
            args.add(
                "-chardev",
                format!("socket,id=qmp{index},path={path},server=on,wait=off"),
            );
            args.add("-mon", format!("chardev=qmp{index},mode=control"));
        }
        if self.incoming {
            args.add("-incoming", "defer");
        }
        args.0.extend(self.extra.iter().cloned());
        args.0
    }

    fn machine_options(&self) -> String {
        let mut options = self.machine.clone();
        if self.memory != Memory::Private {
            options += &format!(",memory-backend={RAM}");
        }
        if matches!(self.firmware, Some(Firmware::Flash(_))) {
            options += &format!(",pflash0={FIRMWARE}");
        }
        if let Some(drive) = self.drives.iter().find(|d| d.bus == Bus::Flash) {
            options += &format!(",pflash1={}", drive.name);
        }
        options
    }

    fn add_memory(&self, args: &mut Args) {
        // The block keeps the name that it has without an object of its own, so that nothing else depends on
        // what memory is made of.
        let mut object = json!({
            "qom-type": "memory-backend-memfd",
            "id": RAM,
            "size": self.memory_bytes,
            "share": true,
            "x-use-canonical-path-for-ramblock-id": false,
        });
        match self.memory {
            Memory::Private => return,
            Memory::Shared => {}
            Memory::Huge => {
                object["hugetlb"] = json!(true);
                object["hugetlbsize"] = json!(HUGE_PAGE);
            }
        }
        args.add("-object", object.to_string());
    }

    /// Starts QEMU; its output is appended to `log`.
    pub fn spawn(&self, log: &Path) -> Result<Launched> {
        let log_error = |source| Error::Io {
            what: "open",
            path: log.to_owned(),
            source,
        };
        let mut file = std::fs::OpenOptions::new()
            .create(true)
            .read(true)
            .append(true)
            .open(log)
            .map_err(log_error)?;
        let log_start = file.seek(SeekFrom::End(0)).map_err(log_error)?;
        let mut command = Command::new(&self.binary);
        command
            .args(self.args())
            .stdin(Stdio::null())
            .stdout(file.try_clone().map_err(log_error)?)
            .stderr(file);
        own_session(&mut command);
        let lifeline = Lifeline::tie(&mut command).map_err(|source| Error::Io {
            what: "make a lifeline for",
            path: self.binary.clone(),
            source,
        })?;
        let child = start(&mut command, &self.binary)?;
        Ok(Launched {
            pid: child.id(),
            exited: reap(child),
            log: log.to_owned(),
            log_start,
            qmp: self.qmp.first().cloned(),
            lifeline,
        })
    }
}

impl Drive {
    fn add(&self, args: &mut Args) {
        // JSON, because paths and export names may hold commas. `direct` keeps QEMU from asking for
        // its own copy in the page cache (an NBD node has none) and lets it believe that flushes
        // matter: durability is the daemon's, so flushes must reach it.
        let blockdev = json!({
            "driver": "raw",
            "node-name": self.name,
            "read-only": self.read_only,
            "discard": "unmap",
            "detect-zeroes": "off",
            "cache": { "direct": true, "no-flush": false },
            "file": {
                "driver": "nbd",
                "node-name": format!("{}-nbd", self.name),
                "server": { "type": "unix", "path": self.socket.to_string_lossy() },
                "export": self.export,
                "reconnect-delay": self.reconnect_delay,
                "read-only": self.read_only,
                "discard": "unmap",
                "cache": { "direct": true, "no-flush": false },
            },
        });
        let (werror, rerror) = self.on_error.words();
        args.add("-blockdev", blockdev.to_string());
        let (driver, bus) = match self.bus {
            Bus::VirtioBlk => ("virtio-blk-pci", None),
            Bus::VirtioScsi => ("scsi-hd", Some(format!("{SCSI}.0"))),
            // QEMU takes the first place that is free.
            Bus::Ide => ("ide-hd", None),
            Bus::Flash => return,
        };
        let mut device = json!({
            "driver": driver,
            "id": format!("virtio-{}", self.name),
            "drive": self.name,
            "werror": werror,
            "rerror": rerror,
        });
        if let Some(bus) = bus {
            device["bus"] = json!(bus);
        }
        args.add("-device", device.to_string());
    }
}

impl Nic {
    fn add(&self, args: &mut Args) {
        let netdev = format!(
            "tap,id={},ifname={},script=no,downscript=no",
            escape(&self.name),
            escape(&self.ifname)
        );
        let device = json!({
            "driver": "virtio-net-pci",
            "id": format!("virtio-{}", self.name),
            "netdev": self.name,
            "mac": self.mac,
            "romfile": "",
        });
        args.add("-netdev", netdev);
        args.add("-device", device.to_string());
    }
}

/// The firmware's node, read-only: its content is the file's on every host.
fn firmware_node(path: &Path) -> String {
    let node = json!({
        "driver": "raw",
        "node-name": FIRMWARE,
        "read-only": true,
        "file": { "driver": "file", "filename": path.to_string_lossy(), "read-only": true },
    });
    node.to_string()
}

struct Args(Vec<OsString>);

impl Args {
    fn add(&mut self, option: &str, value: impl Into<OsString>) {
        self.0.push(option.into());
        self.0.push(value.into());
    }
}

/// In a list of options a comma is written twice.
fn escape(value: &str) -> String {
    value.replace(',', ",,")
}

/// A QEMU that was started.
#[derive(Clone, Debug)]
pub struct Launched {
    pub pid: u32,
    exited: watch::Receiver<Option<ExitStatus>>,
    log: PathBuf,
    log_start: u64,
    qmp: Option<PathBuf>,
    lifeline: Lifeline,
}

impl Launched {
    /// Negotiates on the connection that a later daemon will find again with [`Qmp::lifeline`]: to be done
    /// once, and kept, as what comes on it must be read.
    pub async fn lifeline(&self) -> Result<Qmp> {
        let stream = self.lifeline.stream().map_err(|source| Error::Io {
            what: "use the lifeline of",
            path: self.log.clone(),
            source,
        })?;
        within(PATIENCE, "QEMU's greeting", Qmp::on_lifeline(stream)).await?
    }

    /// Connects to its first monitor socket; [`Error::Exited`] with the log's end if it dies first.
    pub async fn connect(&self) -> Result<Qmp> {
        let Some(path) = &self.qmp else {
            return Err(Error::Phase {
                what: "connecting to a QEMU without a monitor",
            });
        };
        tokio::select! {
            biased;
            qmp = Qmp::connect_patiently(path, PATIENCE) => match (qmp, self.has_exited()) {
                (Err(_), true) => Err(self.exit_error()),
                (qmp, _) => qmp,
            },
            _ = self.exited() => Err(self.exit_error()),
        }
    }

    pub fn has_exited(&self) -> bool {
        self.exited.borrow().is_some()
    }

    /// Returns when it has exited; `None` if that could not be observed.
    pub async fn exited(&self) -> Option<ExitStatus> {
        let mut exited = self.exited.clone();
        exited.wait_for(Option::is_some).await.ok().and_then(|s| *s)
    }

    fn exit_error(&self) -> Error {
        let mut text = Vec::new();
        if let Ok(mut file) = std::fs::File::open(&self.log) {
            let len = file.metadata().map_or(0, |m| m.len());
            let from = self.log_start.max(len.saturating_sub(LOG_TAIL));
            if file.seek(SeekFrom::Start(from)).is_ok() {
                // What cannot be read is missing from the message, nothing else.
                let _ = file.take(LOG_TAIL).read_to_end(&mut text);
            }
        }
        Error::Exited {
            log: String::from_utf8_lossy(&text).trim().to_owned(),
        }
    }
}

fn start(command: &mut Command, binary: &Path) -> Result<Child> {
    command.spawn().map_err(|source| match source.kind() {
        std::io::ErrorKind::NotFound => Error::NoBinary {
            path: binary.to_owned(),
        },
        _ => Error::Io {
            what: "start",
            path: binary.to_owned(),
            source,
        },
    })
}

/// Waits for the child on a thread of its own, so that it is never a zombie.
fn reap(mut child: Child) -> watch::Receiver<Option<ExitStatus>> {
    let (sender, receiver) = watch::channel(None);
    std::thread::spawn(move || {
        if let Ok(status) = child.wait() {
            sender.send_replace(Some(status));
        }
    });
    receiver
}

/// Gives the child a session of its own: no signal to the daemon's terminal or group reaches it.
#[allow(unsafe_code)]
fn own_session(command: &mut Command) {
    // SAFETY: between fork and exec the closure makes one system call, setsid, and touches no memory
    // of the parent's; setsid is async-signal-safe.
    unsafe {
        command.pre_exec(|| {
            rustix::process::setsid()?;
            Ok(())
        });
    }
}

/// A machine type QEMU knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MachineType {
    /// Concrete name (`pc-q35-10.0`).
    pub name: String,
    /// Name that means this one in this version (`q35`).
    pub alias: Option<String>,
}

/// What a QEMU binary can do.
#[derive(Clone, Debug)]
pub struct Probe {
    pub version: Version,
    pub machines: Vec<MachineType>,
}

impl Probe {
    /// The concrete name of a machine type given by name or alias.
    pub fn concrete(&self, machine: &str) -> Result<&str> {
        self.machines
            .iter()
            .find(|m| m.name == machine || m.alias.as_deref() == Some(machine))
            .map(|m| m.name.as_str())
            .ok_or_else(|| Error::UnknownMachine {
                machine: machine.to_owned(),
            })
    }
}

/// Asks a QEMU binary for its version and machine types, by running it without a machine.
pub async fn probe(binary: &Path) -> Result<Probe> {
    let io = |source| Error::Io {
        what: "start",
        path: binary.to_owned(),
        source,
    };
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().map_err(io)?;
    let output = OwnedFd::from(theirs.try_clone().map_err(io)?);
    let mut command = Command::new(binary);
    command
        .args(["-machine", "none", "-nodefaults", "-no-user-config"])
        .args(["-display", "none", "-chardev", "stdio,id=qmp"])
        .args(["-mon", "chardev=qmp,mode=control"])
        .stdin(OwnedFd::from(theirs))
        .stdout(output)
        .stderr(Stdio::null());
    let child = start(&mut command, binary)?;
    // The command still holds QEMU's end, which would keep ours from seeing it close.
    drop(command);
    let mut exited = reap(child);
    ours.set_nonblocking(true).map_err(io)?;
    let ours = tokio::net::UnixStream::from_std(ours).map_err(io)?;
    let qmp = match within(PATIENCE, "QEMU's greeting", Qmp::on(ours)).await? {
        Err(Error::Disconnected { .. } | Error::Protocol { .. }) => {
            return Err(Error::Exited {
                log: format!("{} does not speak QMP", binary.display()),
            });
        }
        other => other?,
    };
    let version = qmp.version();
    if (version.major, version.minor) < OLDEST {
        return Err(Error::TooOld {
            major: version.major,
            minor: version.minor,
        });
    }
    let answer = qmp.execute("query-machines", json!({})).await?;
    let machines = answer
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|machine| {
            Some(MachineType {
                name: machine["name"].as_str()?.to_owned(),
                alias: machine["alias"].as_str().map(str::to_owned),
            })
        })
        .collect();
    // It may close the connection before it has answered.
    let _ = qmp.execute("quit", json!({})).await;
    let until = Instant::now() + PATIENCE;
    let _ = tokio::time::timeout_at(until.into(), exited.wait_for(Option::is_some)).await;
    Ok(Probe { version, machines })
}

/// The machine type (`pc-q35-10.0`) that a QEMU on this host was started with, off its command line: one that
/// waits for a page or for its disks cannot be asked. `None` if there is no such process or it is no QEMU.
pub fn launched_machine(pid: u32) -> Option<String> {
    machine_of(&std::fs::read(format!("/proc/{pid}/cmdline")).ok()?)
}

fn machine_of(command_line: &[u8]) -> Option<String> {
    let mut arguments = command_line.split(|&byte| byte == 0);
    arguments.find(|argument| *argument == b"-machine")?;
    let machine = std::str::from_utf8(arguments.next()?).ok()?;
    let machine = machine.split(',').next().filter(|name| !name.is_empty());
    machine.map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(crate) fn spec() -> LaunchSpec {
        LaunchSpec {
            binary: "qemu-system-x86_64".into(),
            name: "a,b".into(),
            machine: "pc-q35-7.2".into(),
            cpu: "qemu64".into(),
            memory_bytes: 64 << 20,
            memory: Memory::Private,
            vcpus: 1,
            firmware: None,
            accel: vec!["tcg".into()],
            kernel: None,
            drives: Vec::new(),
            nics: Vec::new(),
            serial: None,
            qmp: Vec::new(),
            incoming: true,
            extra: vec!["-S".into()],
        }
    }

    #[test]
    fn a_comma_in_a_path_stays_one() {
        let mut spec = spec();
        spec.qmp = vec!["/run/a,b.sock".into()];
        let args = spec.args();
        let has = |text: &str| args.iter().any(|a| a == text);
        assert!(has("guest=a,,b"));
        assert!(has("socket,id=qmp0,path=/run/a,,b.sock,server=on,wait=off"));
        assert_eq!(args.last().expect("not empty"), "-S");
    }

    #[test]
    fn a_variable_store_makes_the_firmware_flash() {
        let mut spec = spec();
        spec.firmware = Some(Firmware::Flash("/fw,1".into()));
        spec.memory = Memory::Huge;
        spec.drives = [
            ("disk0", Bus::VirtioScsi),
            ("disk1", Bus::VirtioScsi),
            ("disk2", Bus::Flash),
        ]
        .map(|(name, bus)| Drive {
            name: name.into(),
            socket: "/s".into(),
            export: name.into(),
            reconnect_delay: 1,
            read_only: false,
            on_error: OnError::Stop,
            bus,
        })
        .into();
        let args = spec.args();
        let args: Vec<&str> = args.iter().filter_map(|arg| arg.to_str()).collect();
        let machine = "pc-q35-7.2,memory-backend=pc.ram,pflash0=firmware,pflash1=disk2";
        assert!(args.contains(&machine), "{args:?}");
        assert!(
            args.iter()
                .any(|arg| arg.contains("\"filename\":\"/fw,1\""))
        );
        assert!(
            args.iter()
                .any(|arg| arg.contains("\"hugetlbsize\":2097152"))
        );
        let of = |driver: &str| args.iter().filter(|arg| arg.contains(driver)).count();
        assert_eq!(
            (of("virtio-scsi-pci"), of("scsi-hd"), of("virtio-blk-pci")),
            (1, 2, 0)
        );
    }

    #[test]
    fn the_machine_is_read_off_the_command_line() {
        let line = b"qemu\0-name\0guest=m\0-machine\0pc-q35-10.0,usb=off\0-accel\0tcg\0";
        assert_eq!(machine_of(line).as_deref(), Some("pc-q35-10.0"));
        assert_eq!(machine_of(b"sleep\x00100\x00"), None);
        assert_eq!(machine_of(b"qemu\0-machine\0"), None);
    }

    #[tokio::test]
    async fn a_missing_binary_is_told_as_such() {
        let missing = Path::new("/nonexistent/qemu");
        assert!(matches!(probe(missing).await, Err(Error::NoBinary { path }) if path == missing));
    }

    #[tokio::test]
    async fn a_binary_that_is_no_qemu_is_told_as_such() {
        let error = probe(Path::new("/bin/true")).await.expect_err("no QEMU");
        assert!(matches!(error, Error::Exited { .. }), "{error}");
    }

    #[tokio::test]
    async fn the_installed_qemu_knows_its_machines() {
        let probe = probe(Path::new("qemu-system-x86_64"))
            .await
            .expect("probed");
        assert!((probe.version.major, probe.version.minor) >= OLDEST);
        let concrete = probe.concrete("q35").expect("q35");
        assert!(concrete.starts_with("pc-q35-"), "{concrete}");
        assert!(matches!(
            probe.concrete("pc-q35-0.1"),
            Err(Error::UnknownMachine { .. })
        ));
    }

    #[tokio::test]
    async fn a_qemu_that_dies_at_the_start_says_why() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let mut spec = spec();
        spec.machine = "pc-q35-0.1".into();
        spec.qmp = vec![dir.path().join("qmp")];
        let launched = spec.spawn(&dir.path().join("log")).expect("started");
        match launched.connect().await {
            Err(Error::Exited { log }) => assert!(log.contains("pc-q35-0.1"), "{log}"),
            other => panic!("{other:?}"),
        }
    }
}
