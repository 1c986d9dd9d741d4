//! Two hosts with Whimbrel's daemons, and the machine that moves between them.
//!
//! The product is driven as its user drives it: by files and the `whimbrel` command with `--json`, never
//! by its crates. What is measured is measured from outside: by the client's probes, the emulator's
//! counters and the guest's own words.
//!
//! ```text
//!   Pair ── Lab (namespaces, WAN)
//!     ├──── Site a: state folder, configuration, daemon, the command
//!     ├──── Site b
//!     └──── Guest: disk with real files, boot files, probes  ── journey: one move, measured
//! ```

pub mod answers;
mod command;
mod error;
pub(crate) mod folder;
mod follow;
mod guest;
pub mod journey;
mod monitor;
pub mod rates;
mod site;

pub use command::{Refusal, Whimbrel, whimbrel_program};
pub use error::PairError;
pub use folder::Folder;
pub use follow::{Ended, Follow, Seen};
pub use guest::{Guest, GuestSpec, Verdict};
pub use monitor::Monitor;
pub use site::{Site, SiteSpec, qemus_in};

use crate::net::{Host, Lab, LabSpec};
use answers::MachineView;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// How long a guest without KVM may take from its start until its workloads are at work.
const BOOT_WITHIN: Duration = Duration::from_secs(300);

/// How long QEMU may take to end after its guest has shut down.
const END_WITHIN: Duration = Duration::from_secs(120);

/// Two hosts that trust each other, both daemons up.
#[derive(Debug)]
pub struct Pair {
    // The order is that of dropping: daemons, then the namespaces with the QEMUs, then the files.
    a: Site,
    b: Site,
    lab: Lab,
    folder: Folder,
}

/// What the two hosts are to be like.
#[derive(Clone, Debug)]
pub struct PairSpec {
    pub lab: LabSpec,
    pub a: SiteSpec,
    pub b: SiteSpec,
    /// Whether both hosts trust each other from the start.
    pub trust: bool,
}

impl PairSpec {
    pub fn new(lab: LabSpec) -> PairSpec {
        PairSpec {
            lab,
            a: SiteSpec::default(),
            b: SiteSpec::default(),
            trust: true,
        }
    }
}

impl Pair {
    /// Makes the network, both hosts' identities and trust, and starts both daemons.
    pub fn start(spec: &PairSpec) -> Result<Pair, PairError> {
        let mut pair = Pair::prepare(spec)?;
        pair.a.start()?;
        pair.b.start()?;
        Ok(pair)
    }

    /// As [`start`](Self::start), but starts no daemon.
    pub fn prepare(spec: &PairSpec) -> Result<Pair, PairError> {
        let program = whimbrel_program()?;
        let lab = Lab::new(&spec.lab)?;
        let folder = Folder::new()?;
        let site = |host, site_spec| Site::prepare(&lab, host, folder.path(), &program, site_spec);
        let a = site(Host::A, &spec.a)?;
        let b = site(Host::B, &spec.b)?;
        if spec.trust {
            a.trust(Host::B, &b.key()?)?;
            b.trust(Host::A, &a.key()?)?;
        }
        Ok(Pair { a, b, lab, folder })
    }

    pub fn lab(&self) -> &Lab {
        &self.lab
    }

    pub fn folder(&self) -> &Folder {
        &self.folder
    }

    /// Leaves the files where they are when this is dropped.
    pub fn keep_files(&mut self) {
        self.folder.keep();
    }

    pub fn site(&self, host: Host) -> &Site {
        match host {
            Host::A => &self.a,
            Host::B => &self.b,
        }
    }

    pub fn site_mut(&mut self, host: Host) -> &mut Site {
        match host {
            Host::A => &mut self.a,
            Host::B => &mut self.b,
        }
    }

    /// The command, as said on this host.
    pub fn on(&self, host: Host) -> &Whimbrel {
        self.site(host).whimbrel()
    }

    /// Imports the guest's disk and defines its machine; starts nothing.
    pub fn define(&self, host: Host, guest: &Guest) -> Result<(), PairError> {
        let command = self.on(host);
        let image = guest.disk().image.to_string_lossy().into_owned();
        command.run(&["volume", "import", guest.name(), &image])?;
        let file = self
            .site(host)
            .folder()
            .join(format!("{}.toml", guest.name()));
        std::fs::write(&file, guest.machine_toml()).map_err(PairError::io("write", &file))?;
        command.run(&["machine", "define", &file.to_string_lossy()])?;
        Ok(())
    }

    /// Starts the guest's machine and waits until its workloads are at work; how long that took.
    pub fn boot(&self, host: Host, guest: &mut Guest) -> Result<Duration, PairError> {
        let began = Instant::now();
        self.on(host).run(&["machine", "start", guest.name()])?;
        let seen = guest.wait_until_at_work(BOOT_WITHIN);
        if seen.is_err() {
            let console = self.site(host).machine_file(guest.name(), "serial.log");
            return Err(PairError::NoGuest {
                after: BOOT_WITHIN,
                console: tail(&console),
            });
        }
        Ok(began.elapsed())
    }

    /// The machine as a host shows it; `None` if it does not know it.
    pub fn machine(&self, host: Host, name: &str) -> Result<Option<MachineView>, PairError> {
        match self.on(host).answer(&["machine", "show", name]) {
            Ok(view) => Ok(Some(view)),
            Err(PairError::Refused(refusal)) if refusal.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Shuts the guest down on the host where it runs, and checks everything: its own last words, then,
    /// with the machine stopped, its disk there.
    pub fn finish(&self, host: Host, guest: &mut Guest) -> Result<Verdict, PairError> {
        let pid = self.machine(host, guest.name())?.and_then(|m| m.pid);
        let outcome = guest.power_off(&self.lab)?;
        // The process itself is looked at: a daemon may show a machine as stopped a little before or after.
        let process = pid.map(|pid| PathBuf::from(format!("/proc/{pid}/exe")));
        let deadline = Instant::now() + END_WITHIN;
        while process.as_ref().is_some_and(|p| p.read_link().is_ok()) {
            if Instant::now() >= deadline {
                return Err(PairError::StillThere {
                    machine: guest.name().to_owned(),
                    after: END_WITHIN,
                });
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        let volume: answers::VolumeView =
            self.on(host).answer(&["volume", "show", guest.name()])?;
        guest.verify(outcome, &volume.data)
    }
}

/// The end of a log, for error messages.
fn tail(path: &std::path::Path) -> String {
    const MOST: usize = 3000;
    let bytes = std::fs::read(path).unwrap_or_default();
    let start = bytes.len().saturating_sub(MOST);
    String::from_utf8_lossy(&bytes[start..]).into_owned()
}
