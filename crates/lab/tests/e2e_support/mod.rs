//! What the end-to-end tests share: two hosts on a fast link, a small guest, and where to look afterwards.
#![allow(
    dead_code,
    reason = "each test file compiles this module and uses its part of it"
)]

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use whimbrel_lab::LabError;
use whimbrel_lab::net::{Host, LabSpec, available};
use whimbrel_lab::pair::answers::{
    Listed, MachineStatus, MachineView, MigrationReport, VolumeView,
};
use whimbrel_lab::pair::{Ended, Guest, GuestSpec, Pair, PairError, PairSpec, Refusal};
use whimbrel_lab::wan::{LineSpec, WanSpec};

/// The machine's name in all tests, and its volume's.
pub const NAME: &str = "guest";

/// How long a move of the small guest may take; it takes seconds.
pub const MOVE_WITHIN: Duration = Duration::from_secs(300);

pub fn secs(n: u64) -> Duration {
    Duration::from_secs(n)
}

/// Both ways; the round trip is twice the delay.
pub fn line(megabits: u64, delay_ms: u64) -> LineSpec {
    LineSpec::new(megabits * 1_000_000, Duration::from_millis(delay_ms))
}

/// Two hosts 400 Mbit/s and 10 ms apart.
pub fn fast() -> PairSpec {
    PairSpec::new(LabSpec::new(WanSpec::symmetric(line(400, 5))))
}

/// Whether this machine can carry a test; prints the reason if it cannot.
pub fn can_run() -> bool {
    match available() {
        Ok(()) => true,
        Err(LabError::Unavailable { reason }) => {
            eprintln!("skipped: no lab on this machine: {reason}");
            false
        }
        Err(error) => panic!("{error}"),
    }
}

/// Both daemons up; on a failure, their logs go to the test's output.
pub fn start(spec: &PairSpec) -> Scene {
    Scene {
        pair: Pair::start(spec).expect("two hosts come up"),
    }
}

pub fn prepare(spec: &PairSpec) -> Scene {
    Scene {
        pair: Pair::prepare(spec).expect("two hosts are made"),
    }
}

/// A pair that shows its daemons' logs if the test fails.
pub struct Scene {
    pub pair: Pair,
}

impl std::ops::Deref for Scene {
    type Target = Pair;
    fn deref(&self) -> &Pair {
        &self.pair
    }
}

impl std::ops::DerefMut for Scene {
    fn deref_mut(&mut self) -> &mut Pair {
        &mut self.pair
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for host in Host::BOTH {
                let site = self.pair.site(host);
                eprintln!("---- log of {host} ----\n{}", site.log_text());
                for file in ["qemu.log", "serial.log"] {
                    let text = std::fs::read(site.machine_file(NAME, file)).unwrap_or_default();
                    let text = String::from_utf8_lossy(&text);
                    let start = text.len().saturating_sub(2000);
                    let start = (start..).find(|&i| text.is_char_boundary(i)).unwrap_or(0);
                    eprintln!("---- end of {file} of {host} ----\n{}", &text[start..]);
                }
            }
        }
    }
}

impl Scene {
    /// A small guest at work on `host`.
    pub fn guest_on(&self, host: Host) -> Guest {
        self.guest_of(host, GuestSpec::small(NAME))
    }

    pub fn guest_of(&self, host: Host, spec: GuestSpec) -> Guest {
        let mut guest = Guest::new(self.lab(), spec).expect("the guest is built");
        self.define(host, &guest).expect("the machine is defined");
        self.boot(host, &mut guest).expect("the guest boots");
        guest
    }

    /// A machine that is known and does not run; enough for what fails before a move begins.
    pub fn defined_on(&self, host: Host) -> Guest {
        let guest = Guest::new(self.lab(), GuestSpec::small(NAME)).expect("the guest is built");
        self.define(host, &guest).expect("the machine is defined");
        guest
    }

    /// Moves the guest and waits for the end; fails the test unless it completes.
    pub fn moves(&self, from: Host, options: &[&str]) -> Ended {
        let ended = self.tries_to_move(from, options);
        assert!(ended.completed(), "{}", ended.describe());
        ended
    }

    /// Starts a move and waits for its end, whatever that is.
    pub fn tries_to_move(&self, from: Host, options: &[&str]) -> Ended {
        let to = from.other().to_string();
        let mut args = vec!["migrate", NAME, "--to", &to];
        args.extend(options);
        let mut follow = self.on(from).follow(&args).expect("the command starts");
        follow.end(MOVE_WITHIN).expect("the move ends")
    }

    /// Lets the guest shut down on `host` and checks all that can be checked.
    pub fn verified_on(&self, host: Host, guest: &mut Guest) {
        let verdict = self.finish(host, guest).expect("the guest shuts down");
        assert_eq!(verdict.problems, Vec::<String>::new());
    }

    /// The guest works on, without errors.
    pub fn works(&self, guest: &mut Guest) {
        guest.wait_for_report(secs(20)).expect("the guest reports");
        guest.wait_for_report(secs(20)).expect("and again");
        assert_eq!(guest.errors(), 0);
    }

    pub fn status(&self, host: Host) -> Option<MachineStatus> {
        let machine = self.machine(host, NAME).expect("the daemon answers");
        machine.map(|view| view.status)
    }

    /// Waits until the machine's status on `host` is this.
    pub fn reaches(&self, host: Host, wanted: Option<MachineStatus>) {
        let deadline = Instant::now() + secs(30);
        loop {
            let status = self.status(host);
            if status == wanted {
                return;
            }
            assert!(
                Instant::now() < deadline,
                "{host}: {status:?}, not {wanted:?}"
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Nothing of a machine is on `host`: no record, no file, no process.
    pub fn is_clean(&self, host: Host) {
        self.reaches(host, None);
        let machines: Listed<MachineView> =
            self.on(host).answer(&["machine", "ls"]).expect("listed");
        assert!(
            machines.items.is_empty() && machines.damaged.is_empty(),
            "{machines:?}"
        );
        let volumes: Listed<VolumeView> = self.on(host).answer(&["volume", "ls"]).expect("listed");
        assert!(
            volumes.items.is_empty() && volumes.damaged.is_empty(),
            "{volumes:?}"
        );
        let site = self.site(host);
        let deadline = Instant::now() + secs(10);
        while !site.qemus().is_empty() {
            assert!(
                Instant::now() < deadline,
                "QEMU still runs on {host}: {:?}",
                site.qemus()
            );
            std::thread::sleep(Duration::from_millis(50));
        }
        // The daemon removes them once QEMU is gone.
        for folder in ["machines", "volumes"] {
            loop {
                let left = files_under(&site.state().join(folder));
                if left.is_empty() {
                    break;
                }
                assert!(Instant::now() < deadline, "left on {host}: {left:?}");
                std::thread::sleep(Duration::from_millis(50));
            }
        }
    }
}

/// Every file and folder under `folder`.
pub fn files_under(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).expect("a folder").flatten() {
            if entry.path().is_dir() {
                folders.push(entry.path());
            }
            found.push(entry.path());
        }
    }
    found
}

/// All was compared, nothing was lost on the way, and nothing went twice but what the guest wrote to.
pub fn each_unit_once(report: &MigrationReport) {
    assert!(report.verified);
    assert_eq!(report.units_sent_again, 0);
    assert!(
        report.units_sent <= report.units_live + report.units_outdated + report.units_repeated,
        "{report:?}"
    );
}

/// What the command refused with.
pub fn refusal<T: std::fmt::Debug>(result: Result<T, PairError>) -> Refusal {
    match result {
        Err(PairError::Refused(refusal)) => *refusal,
        other => panic!("not refused: {other:?}"),
    }
}

/// A refusal tells what, the state now, and what to do next; the words given are in what it tells.
#[track_caller]
pub fn tells(refusal: &Refusal, code: &str, words: &[&str]) {
    let error = refusal.error.as_ref();
    let error = error.unwrap_or_else(|| panic!("no error in JSON: {refusal:?}"));
    assert_eq!(error.code, code, "{refusal:?}");
    for word in words {
        assert!(
            error.what.contains(word),
            "{word:?} is not in {:?}",
            error.what
        );
    }
    assert!(error.next_step.is_some(), "no next step: {refusal:?}");
}

/// Writes a program.
pub fn script(path: &Path, text: &str) -> PathBuf {
    std::fs::write(path, text).expect("written");
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).expect("executable");
    path.to_owned()
}
