//! The guest that moves: what it is made of, what it says, and the check at its end.

use super::PairError;
use super::site::NETWORK;
use crate::LabError;
use crate::guest::{
    Ack, BootFiles, Control, Disk, DiskSpec, Line, Outcome, Params, Report, VerifyReport,
    cache_dir, verify,
};
use crate::net::{CLIENT, Lab, Place, guest_address};
use crate::probe::{EchoProber, EchoSpec, LineCollector};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::time::{Duration, Instant};
use whimbrel_workload::params::{Cidr, Pace};
use whimbrel_workload::report::Totals;

/// How long the guest's answer to `poweroff` may take: it checks all of its pages first, and after a move
/// under load that is slow without KVM.
const POWEROFF_WITHIN: Duration = Duration::from_secs(180);

/// Between two looks for a report.
const LOOK: Duration = Duration::from_millis(20);

/// What a guest is to be like.
#[derive(Clone, Debug)]
pub struct GuestSpec {
    /// The machine's name, and its volume's.
    pub name: String,
    pub memory_mib: u32,
    pub disk: DiskSpec,
    /// Volumes beside its own that its machine has as disks, after it; the guest leaves them alone. Whoever
    /// names them makes them.
    pub more_volumes: Vec<String>,
    /// The machine's `on_disk_error`; the default without one.
    pub on_disk_error: Option<String>,
    /// What it does; its network is filled in.
    pub params: Params,
    /// QEMU's machine type; `q35` without one.
    pub machine_type: Option<String>,
    pub vcpus: u32,
    /// How its disks are attached, in the description's words; the default without one.
    pub bus: Option<String>,
    /// A volume in flash, for a UEFI firmware's variables.
    pub flash: Option<String>,
    /// Network cards beside its own, which the guest leaves alone.
    pub more_nics: u32,
    /// Whether the guest may reboot; otherwise its machine ends with the first reset.
    pub reboots: bool,
    /// Further arguments for QEMU.
    pub extra_args: Vec<String>,
    /// Further lines of the description.
    pub lines: Vec<String>,
}

impl GuestSpec {
    /// 512 MiB with a hot set of 64 MiB, a disk of 2 GiB with 600 MiB of files; a report twice a second.
    pub fn large(name: &str) -> GuestSpec {
        let params = Params {
            interval_ms: 500,
            ..Params::default()
        };
        GuestSpec {
            name: name.to_owned(),
            memory_mib: 512,
            disk: DiskSpec::default(),
            more_volumes: Vec::new(),
            on_disk_error: None,
            params,
            machine_type: None,
            vcpus: 1,
            bus: None,
            flash: None,
            more_nics: 0,
            reboots: false,
            extra_args: Vec::new(),
            lines: Vec::new(),
        }
    }

    /// 256 MiB with a hot set of 32 MiB, a disk of 512 MiB with 150 MiB of files.
    pub fn medium(name: &str) -> GuestSpec {
        let mut spec = GuestSpec::large(name);
        spec.memory_mib = 256;
        spec.disk.size_mib = 512;
        spec.disk.files_mib = 150;
        spec.params.ram.hot_mib = 32;
        spec.params.ram.region_mib = 32;
        spec.params.log.max_mib = 32;
        spec.params.random.file_mib = 32;
        spec.params.read.drop_s = 10;
        spec
    }

    /// 192 MiB with a hot set of 16 MiB, a disk of 256 MiB with 40 MiB of files.
    pub fn small(name: &str) -> GuestSpec {
        let mut spec = GuestSpec::medium(name);
        spec.memory_mib = 192;
        spec.disk.size_mib = 256;
        spec.disk.files_mib = 40;
        spec.params.ram.hot_mib = 16;
        spec.params.ram.region_mib = 16;
        spec.params.log.max_mib = 8;
        spec.params.random.file_mib = 8;
        spec.params.read.drop_s = 3;
        spec
    }

    /// Builds what takes time (disk, initramfs) unless it is in the cache.
    pub fn build(&self) -> Result<(Disk, BootFiles), PairError> {
        let cache = cache_dir();
        Ok((self.disk.build(&cache)?, BootFiles::prepare(&cache)?))
    }
}

/// Whether everything was right in the end.
#[derive(Clone, Debug)]
pub struct Verdict {
    /// The guest's own last words.
    pub outcome: Outcome,
    /// Its disk, looked at from outside.
    pub disk: VerifyReport,
    /// Sentences; empty if all is well.
    pub problems: Vec<String>,
}

/// A guest on the LAN of a lab.
#[derive(Debug)]
pub struct Guest {
    spec: GuestSpec,
    disk: Disk,
    boot: BootFiles,
    address: Ipv4Addr,
    lines: LineCollector,
    /// All its reports, oldest first.
    reports: Vec<(Instant, Report)>,
    acknowledged: Ack,
    fatal: Option<String>,
}

impl Guest {
    /// Builds the disk and the boot files where they are not in the cache (seconds, the first time), and
    /// listens for the guest.
    pub fn new(lab: &Lab, spec: GuestSpec) -> Result<Guest, PairError> {
        let (disk, boot) = spec.build()?;
        let port = spec.params.client_port;
        let lines = LineCollector::start(lab.namespace(Place::Client), port)?;
        let mut guest = Guest {
            disk,
            boot,
            address: guest_address(0),
            lines,
            reports: Vec::new(),
            acknowledged: Ack::default(),
            fatal: None,
            spec,
        };
        let address = guest.address;
        let params = &mut guest.spec.params;
        params.ip = Some(Cidr {
            address,
            prefix: 24,
        });
        params.client = Some(CLIENT);
        Ok(guest)
    }

    pub fn name(&self) -> &str {
        &self.spec.name
    }

    pub fn spec(&self) -> &GuestSpec {
        &self.spec
    }

    pub fn disk(&self) -> &Disk {
        &self.disk
    }

    pub fn boot_files(&self) -> &BootFiles {
        &self.boot
    }

    /// The machine's description, as `machine define` takes it.
    pub fn machine_toml(&self) -> String {
        let GuestSpec {
            name, memory_mib, ..
        } = &self.spec;
        let append = BootFiles::append(&self.spec.params);
        let machine_type = match &self.spec.machine_type {
            Some(name) => format!("machine_type = {name:?}\n"),
            None => String::new(),
        };
        let on_disk_error = match &self.spec.on_disk_error {
            Some(word) => format!("on_disk_error = {word:?}\n"),
            None => String::new(),
        };
        let bus = match &self.spec.bus {
            Some(word) => format!("bus = {word:?}\n"),
            None => String::new(),
        };
        let disks: String = std::iter::once(name)
            .chain(&self.spec.more_volumes)
            .map(|volume| format!("[[disk]]\nvolume = {volume:?}\n{bus}\n"))
            .collect();
        let flash = match &self.spec.flash {
            Some(volume) => format!("[[disk]]\nvolume = {volume:?}\nbus = \"flash\"\n\n"),
            None => String::new(),
        };
        let nic = format!("[[nic]]\nnetwork = \"{NETWORK}\"\n\n");
        let nics = nic.repeat(1 + self.spec.more_nics as usize);
        let mut extra = self.spec.extra_args.clone();
        if !self.spec.reboots {
            extra.push("-no-reboot".to_owned());
        }
        let lines: String = self.spec.lines.iter().map(|l| format!("{l}\n")).collect();
        format!(
            "name = {name:?}\nmemory = \"{memory_mib}MiB\"\nvcpus = {}\naccel = \"tcg\"\n{machine_type}\
             kernel = {:?}\ninitrd = {:?}\nappend = {append:?}\nextra_args = {extra:?}\n{on_disk_error}{lines}\n\
             {disks}{flash}{nics}",
            self.spec.vcpus, self.boot.kernel, self.boot.initramfs,
        )
    }

    /// Starts asking, from the client, whether the guest is there.
    pub fn echo(&self, lab: &Lab) -> Result<EchoProber, PairError> {
        let target = SocketAddr::from((self.address, self.spec.params.echo_port));
        let client = lab.namespace(Place::Client);
        Ok(EchoProber::start(client, EchoSpec::new(target))?)
    }

    /// Takes in what the guest has said since the last time.
    pub fn listen(&mut self) {
        for line in self.lines.take() {
            match Line::find(&line.text) {
                Some(Line::Report(report)) => self.reports.push((line.at, report)),
                Some(Line::Ack(ack)) => self.acknowledged = self.acknowledged.max(ack),
                Some(Line::Fatal { message }) => self.fatal = Some(message),
                // Faults are counted in the reports; the rest is said on the console.
                _ => {}
            }
        }
    }

    /// The guest was set back to an earlier moment: what it said since then it does not know of any more.
    pub fn set_back(&mut self) {
        self.listen();
        self.reports.clear();
        self.acknowledged = Ack::default();
    }

    /// Waits for a report that comes from now on.
    pub fn wait_for_report(&mut self, within: Duration) -> Result<(), PairError> {
        self.listen();
        let before = self.reports.len();
        let deadline = Instant::now() + within;
        loop {
            self.listen();
            if let Some(message) = &self.fatal {
                return Err(PairError::GuestFatal {
                    message: message.clone(),
                });
            }
            if self.reports.len() > before {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(PairError::NoGuest {
                    after: within,
                    console: String::new(),
                });
            }
            std::thread::sleep(LOOK);
        }
    }

    /// Waits until every workload that is to do something has done something.
    pub fn wait_until_at_work(&mut self, within: Duration) -> Result<(), PairError> {
        let deadline = Instant::now() + within;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            self.wait_for_report(left)?;
            let idle = self
                .reports
                .last()
                .is_none_or(|(_, report)| self.idle(&report.totals).is_some());
            if !idle {
                return Ok(());
            }
        }
    }

    /// A workload that should have done something by now and has not.
    fn idle(&self, totals: &Totals) -> Option<&'static str> {
        let params = &self.spec.params;
        let workloads = [
            ("RAM", totals.ram_pages, params.ram.pace),
            ("log", totals.log_records, params.log.pace),
            ("random", totals.random_writes, params.random.pace),
            ("read", totals.read_bytes, params.read.pace),
        ];
        let idle = |(_, done, pace): &&(&str, u64, Pace)| *done == 0 && *pace != Pace::Off;
        Some(workloads.iter().find(idle)?.0)
    }

    /// Its reports so far, oldest first; see [`listen`](Self::listen).
    pub fn reports(&self) -> &[(Instant, Report)] {
        &self.reports
    }

    /// Checks and operations that failed, as of its last report.
    pub fn errors(&self) -> u64 {
        self.reports.last().map_or(0, |(_, report)| report.errors)
    }

    /// A control connection, from the client.
    pub fn control(&self, lab: &Lab, patience: Duration) -> Result<Control, PairError> {
        let address = (self.address, self.spec.params.control_port);
        let connect = || Ok::<_, LabError>(Control::connect(address, patience));
        Ok(lab
            .namespace(Place::Client)
            .run("guest control", connect)??)
    }

    /// Lets the guest check all its pages and shut down; its last words.
    pub fn power_off(&mut self, lab: &Lab) -> Result<Outcome, PairError> {
        let outcome = self.control(lab, POWEROFF_WITHIN)?.poweroff()?;
        self.listen();
        Ok(outcome)
    }

    /// The disk of a guest that ended as by a power cut: sentences about what is wrong with it.
    pub fn verify_crashed(&self, image: &Path) -> Result<Vec<String>, PairError> {
        let disk = verify(image, &self.disk.manifest, self.acknowledged)?;
        Ok(faults_of(&disk).into_iter().collect())
    }

    /// The stopped guest's disk against everything that is known about it.
    pub fn verify(&self, outcome: Outcome, image: &Path) -> Result<Verdict, PairError> {
        let said = Ack {
            seq: outcome.last_fsynced_seq,
            generation: outcome.last_fsynced_generation,
        };
        let disk = verify(image, &self.disk.manifest, said.max(self.acknowledged))?;
        let mut problems = Vec::new();
        if outcome.errors > 0 {
            let first: Vec<String> = outcome
                .faults
                .iter()
                .take(3)
                .map(|f| format!("{f:?}"))
                .collect();
            problems.push(format!(
                "the guest found {} errors, the first: {}",
                outcome.errors,
                first.join("; ")
            ));
        }
        let pages = u64::from(self.spec.params.ram.region_mib) * 256;
        if outcome.ram_pages_checked != pages {
            problems.push(format!(
                "the guest checked {} of its {pages} pages",
                outcome.ram_pages_checked
            ));
        }
        if !outcome.unmounted {
            problems.push("the guest could not unmount its disk".to_owned());
        }
        if let Some(workload) = self.idle(&outcome.totals) {
            problems.push(format!("the guest's {workload} workload did nothing"));
        }
        if disk.journal_replayed {
            problems.push("the guest shut down but its disk's journal was not clean".to_owned());
        }
        problems.extend(faults_of(&disk));
        Ok(Verdict {
            outcome,
            disk,
            problems,
        })
    }
}

fn faults_of(disk: &VerifyReport) -> Option<String> {
    let first = disk.failures.iter().take(3).map(|f| format!("{f:?}"));
    let first: Vec<String> = first.collect();
    (!disk.passed()).then(|| {
        format!(
            "the disk has {} faults, the first: {}",
            disk.failure_count,
            first.join("; ")
        )
    })
}
