//! Which QEMU the laboratory takes, and which one is there.
//!
//! Its guests always run without KVM, and there QEMU before 8.0 loses guest writes in migrations: in 9 of 9 runs of
//! 7.2's own pre-copy the guest was corrupted. Whimbrel therefore refuses to move a guest away from such a QEMU, so
//! with one of them neither the demo nor the tests that move a guest can run. Debian 12's own is 7.2.

use std::fmt;
use std::process::{Command, Stdio};

use crate::process::find_program;

pub const PROGRAM: &str = "qemu-system-x86_64";

/// The oldest that will do.
pub const OLDEST: Version = Version(8, 0);

/// Why an older one will not.
pub const WHY_NOT_OLDER: &str =
    "without KVM, QEMU before 8.0 loses guest writes in every migration, its own too";

/// Major and minor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(pub u32, pub u32);

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.0, self.1)
    }
}

/// The version of the QEMU that would be started; none if there is none, or it does not say. It is asked itself, not
/// the package system: that is faster, and it may have come from elsewhere.
pub fn installed() -> Option<Version> {
    let said = said_by(Command::new(find_program(PROGRAM)?).arg("--version"))?;
    of_program(&said)
}

/// The version that apt would install now; from the suite, if one is named and configured.
pub fn candidate(package: &str, suite: Option<&str>) -> Option<Version> {
    let mut policy = Command::new("apt-cache");
    policy.env("LC_ALL", "C");
    if let Some(suite) = suite {
        policy.args(["-o", &format!("APT::Default-Release={suite}")]);
    }
    of_policy(&said_by(policy.args(["policy", package]))?)
}

/// Whether this is one that the laboratory can use.
pub fn will_do(version: Option<Version>) -> bool {
    version.is_some_and(|version| version >= OLDEST)
}

/// Where the QEMU is, for messages.
pub fn place() -> String {
    find_program(PROGRAM).map_or_else(|| PROGRAM.into(), |file| file.display().to_string())
}

fn said_by(command: &mut Command) -> Option<String> {
    let output = command
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output()
        .ok()?;
    output
        .status
        .success()
        .then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

/// From what `--version` prints: `QEMU emulator version 10.0.2 (Debian ...)`.
fn of_program(said: &str) -> Option<Version> {
    leading(said.split_once("version ")?.1)
}

/// From what `apt-cache policy` prints, a line of which is `  Candidate: 1:7.2+dfsg-7+deb12u18`: a version of
/// deb-version(7), its epoch before the colon. `(none)` if there is no candidate.
fn of_policy(said: &str) -> Option<Version> {
    let version = said
        .lines()
        .find_map(|line| line.trim().strip_prefix("Candidate:"))?
        .trim();
    leading(version.split_once(':').map_or(version, |(_, rest)| rest))
}

/// The two numbers that a text begins with.
fn leading(text: &str) -> Option<Version> {
    let mut numbers = text.splitn(3, |c: char| !c.is_ascii_digit());
    Some(Version(
        numbers.next()?.parse().ok()?,
        numbers.next()?.parse().ok()?,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_tells_its_version() {
        let debian =
            "QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2+deb13u1~bpo12+1)\nCopyright\n";
        assert_eq!(of_program(debian), Some(Version(10, 0)));
        assert_eq!(
            of_program("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7)"),
            Some(Version(7, 2))
        );
        assert_eq!(of_program("something else"), None);
    }

    #[test]
    fn the_candidate_is_read_and_not_the_installed() {
        let policy = "qemu-system-x86:\n  Installed: 1:10.0.2+ds-2\n  Candidate: 1:7.2+dfsg-7+deb12u18+b3\n  Version table:\n";
        assert_eq!(of_policy(policy), Some(Version(7, 2)));
        assert_eq!(
            of_policy("x:\n  Installed: (none)\n  Candidate: (none)\n"),
            None
        );
        assert_eq!(of_policy(""), None);
    }

    #[test]
    fn what_debian_12_has_will_not_do_and_its_backport_will() {
        assert!(!will_do(Some(Version(7, 2))));
        assert!(!will_do(None));
        assert!(will_do(Some(Version(8, 0))));
        assert!(will_do(Some(Version(10, 0))));
    }
}
