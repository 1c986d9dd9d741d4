//! One host: its state folder, its configuration, its daemon.

use super::answers::HostView;
use super::{PairError, Whimbrel, tail};
use crate::net::{BRIDGE, Host, Lab, Namespace};
use crate::process::Process;
use rustix::process::Signal;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::time::{Duration, Instant};

/// The network's name in machines' descriptions; each host maps it to its own bridge.
pub const NETWORK: &str = "lan";

const PORT: u16 = 7420;

const UP_WITHIN: Duration = Duration::from_secs(60);

/// How long a daemon may take to stop in an orderly way.
const STOP_WITHIN: Duration = Duration::from_secs(60);

/// What a host is to be like.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SiteSpec {
    /// QEMU's program; without one, the daemon's default.
    pub qemu: Option<PathBuf>,
    /// The log's filter; without one, the daemon's default.
    pub log: Option<String>,
}

/// A host whose daemon may or may not be running.
#[derive(Debug)]
pub struct Site {
    host: Host,
    folder: PathBuf,
    namespace: Namespace,
    whimbrel: Whimbrel,
    daemon: Option<Process>,
}

impl Site {
    /// Writes the configuration and makes the identity.
    pub(super) fn prepare(
        lab: &Lab,
        host: Host,
        parent: &Path,
        program: &Path,
        spec: &SiteSpec,
    ) -> Result<Site, PairError> {
        let folder = parent.join(match host {
            Host::A => "a",
            Host::B => "b",
        });
        std::fs::create_dir(&folder).map_err(PairError::io("create", &folder))?;
        let whimbrel = Whimbrel::new(program, &folder.join("whimbrel.toml"));
        let site = Site {
            host,
            folder,
            namespace: lab.namespace(host).clone(),
            whimbrel,
            daemon: None,
        };
        site.configure(spec)?;
        site.whimbrel
            .run(&["host", "init", "--name", &host.to_string()])?;
        Ok(site)
    }

    /// Writes the configuration anew; the daemon reads it when it starts.
    pub fn configure(&self, spec: &SiteSpec) -> Result<(), PairError> {
        let mut text = format!(
            "listen = \"{}:{PORT}\"\nstate = {:?}\n",
            self.host.wan_address(),
            self.state()
        );
        if let Some(qemu) = &spec.qemu {
            text += &format!("qemu = {qemu:?}\n");
        }
        if let Some(log) = &spec.log {
            text += &format!("log = {log:?}\n");
        }
        text += &format!("\n[networks]\n{NETWORK} = \"{BRIDGE}\"\n");
        let path = self.folder.join("whimbrel.toml");
        std::fs::write(&path, text).map_err(PairError::io("write", path))
    }

    pub fn host(&self) -> Host {
        self.host
    }

    /// Everything of this host.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The state directory.
    pub fn state(&self) -> PathBuf {
        self.folder.join("s")
    }

    pub fn whimbrel(&self) -> &Whimbrel {
        &self.whimbrel
    }

    /// A file in a machine's folder.
    pub fn machine_file(&self, machine: &str, file: &str) -> PathBuf {
        self.state().join("machines").join(machine).join(file)
    }

    /// The host's key, as the other host must be told it.
    pub fn key(&self) -> Result<String, PairError> {
        let view: HostView = self.whimbrel.answer(&["host", "show"])?;
        Ok(view.key)
    }

    /// Makes this host trust `peer` under `key`.
    pub fn trust(&self, peer: Host, key: &str) -> Result<(), PairError> {
        let address = format!("{}:{PORT}", peer.wan_address());
        self.whimbrel
            .run(&["host", "trust", &peer.to_string(), key, &address])?;
        Ok(())
    }

    /// The file of the daemon's log.
    pub fn log(&self) -> PathBuf {
        self.folder.join("daemon.log")
    }

    /// The daemon's log so far.
    pub fn log_text(&self) -> String {
        let bytes = std::fs::read(self.log()).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Starts the daemon and waits until it answers.
    pub fn start(&mut self) -> Result<(), PairError> {
        let command = self.daemon_command();
        self.start_as(command)
    }

    /// `whimbrel host run` for this host, to be wrapped or changed before it is given to
    /// [`start_as`](Self::start_as).
    pub fn daemon_command(&self) -> Command {
        self.whimbrel.command(&["host", "run"])
    }

    /// Starts the daemon by another command.
    pub fn start_as(&mut self, mut command: Command) -> Result<(), PairError> {
        self.namespace.enter(&mut command);
        let name = format!("daemon of {}", self.host);
        let mut daemon = Process::spawn(&name, command, &self.log())?;
        let deadline = Instant::now() + UP_WITHIN;
        loop {
            if let Some(status) = daemon.status()? {
                return Err(PairError::DaemonEnded {
                    host: self.host.to_string(),
                    status,
                    log: tail(&self.log()),
                });
            }
            let view: Result<HostView, _> = self.whimbrel.answer(&["host", "show"]);
            if view.is_ok_and(|view| view.daemon.is_some()) {
                self.daemon = Some(daemon);
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(PairError::DaemonNotUp {
                    host: self.host.to_string(),
                    after: UP_WITHIN,
                    log: tail(&self.log()),
                });
            }
            std::thread::sleep(Duration::from_millis(30));
        }
    }

    /// Whether the daemon is there.
    pub fn is_running(&mut self) -> Result<bool, PairError> {
        match &mut self.daemon {
            Some(daemon) => Ok(daemon.is_running()?),
            None => Ok(false),
        }
    }

    /// Stops the daemon as an operator would; guests run on.
    pub fn stop(&mut self) -> Result<Option<ExitStatus>, PairError> {
        match self.daemon.take() {
            Some(mut daemon) => Ok(Some(daemon.end(STOP_WITHIN)?)),
            None => Ok(None),
        }
    }

    /// Kills the daemon with SIGKILL; guests run on.
    pub fn kill9(&mut self) -> Result<(), PairError> {
        if let Some(mut daemon) = self.daemon.take() {
            daemon.kill9()?;
        }
        Ok(())
    }

    /// Sends the daemon a signal; to none, or one that has ended: nothing.
    pub fn signal(&mut self, signal: Signal) -> Result<(), PairError> {
        if let Some(daemon) = &mut self.daemon {
            daemon.signal(signal)?;
        }
        Ok(())
    }

    /// Process ids of the QEMUs in this host's namespace.
    pub fn qemus(&self) -> Vec<u32> {
        qemus_in(&self.namespace)
    }

    /// The host's namespace.
    pub fn namespace(&self) -> &Namespace {
        &self.namespace
    }
}

/// Process ids of the QEMUs with a machine in a namespace.
pub fn qemus_in(namespace: &Namespace) -> Vec<u32> {
    let Ok(mine) = std::fs::metadata(Path::new("/run/netns").join(namespace.name())) else {
        return Vec::new();
    };
    let Ok(processes) = std::fs::read_dir("/proc") else {
        return Vec::new();
    };
    let inode = std::os::unix::fs::MetadataExt::ino(&mine);
    let link = format!("net:[{inode}]");
    processes
        .flatten()
        .filter(|p| {
            std::fs::read_link(p.path().join("ns/net")).is_ok_and(|l| l.as_os_str() == &*link)
                && std::fs::read(p.path().join("cmdline"))
                    .is_ok_and(|c| is_machine(&String::from_utf8_lossy(&c)))
        })
        .filter_map(|p| p.file_name().to_str()?.parse().ok())
        .collect()
}

/// Whether a command line (its words ended by zeroes) is that of a QEMU with a machine, and not of a
/// probe, which has `-machine none`, nor of a shell that starts it.
fn is_machine(cmdline: &str) -> bool {
    let mut words = cmdline.split('\0');
    let program = words.next().unwrap_or_default();
    program.contains("qemu-system") && words.any(|word| word.starts_with("guest="))
}
