//! Installs Debian packages with apt.
//!
//! The trap is QEMU. `qemu-system-x86` and `qemu-utils` must be of one version: a newer `qemu-utils` breaks an older
//! `qemu-system-x86`, and on machines whose `qemu-utils` came from the backports the release's `qemu-system-x86`
//! can therefore not be installed. So every plan is tried dry first. If the release's QEMU does not go in, both
//! packages come from the release's backports, which are configured for it if they are not. No plan may remove a
//! package: this is somebody's machine.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::error::Error;
use crate::needs::{Need, QEMU_SYSTEM, QEMU_UTILS};
use crate::process;
use crate::sources;

const ETC_APT: &str = "/etc/apt";
const BACKPORTS_FILE: &str = "/etc/apt/sources.list.d/whimbrel-backports.sources";

/// Installs the packages, having said which and why.
pub fn install(needs: &[&Need]) -> Result<(), Error> {
    println!("This machine lacks:");
    for need in needs {
        println!("  {:<18} {}", need.package, need.why);
    }
    let packages: Vec<&'static str> = needs.iter().map(|need| need.package).collect();
    let by_hand = |why: String| Error::ByHand {
        why,
        packages: packages.clone(),
    };

    let codename = debian_codename(&fs::read_to_string("/etc/os-release").unwrap_or_default())
        .filter(|_| process::find_program("apt-get").is_some())
        .ok_or_else(|| by_hand("This is not Debian, so nothing is installed.".into()))?;
    if !is_root() {
        return Err(by_hand(
            "Installing needs root, and this is an ordinary user.".into(),
        ));
    }

    update();
    let (qemu, others): (Vec<&str>, Vec<&str>) = packages
        .iter()
        .partition(|name| [QEMU_SYSTEM, QEMU_UTILS].contains(name));
    if !others.is_empty() {
        println!(
            "Installing from the configured sources: {}",
            others.join(" ")
        );
        get(&others, None).map_err(|error| by_hand(error.to_string()))?;
    }
    if !qemu.is_empty() {
        install_qemu(&qemu, &codename).map_err(|error| by_hand(error.to_string()))?;
    }
    match needs.iter().find(|need| !need.is_present()) {
        None => Ok(()),
        Some(need) => Err(Error::ByHand {
            why: format!(
                "apt installed {}, but what it is needed for is still not there.",
                need.package
            ),
            packages: vec![need.package],
        }),
    }
}

fn install_qemu(packages: &[&str], codename: &str) -> Result<(), Error> {
    if dry_run(packages, None) {
        println!(
            "Installing from the configured sources: {}",
            packages.join(" ")
        );
        return get(packages, None);
    }
    let suite = format!("{codename}-backports");
    println!(
        "The {} of {codename} cannot be installed beside what is there{}.\n\
         So both QEMU packages come from {suite}, in one version.",
        packages.join(" and "),
        installed_version(QEMU_UTILS)
            .map(|version| format!(" ({QEMU_UTILS} {version})"))
            .unwrap_or_default(),
    );
    add_backports(codename, &suite)?;
    // Both, although one may be there: apt must be free to bring it to the same version.
    get(&[QEMU_SYSTEM, QEMU_UTILS], Some(&suite))
}

/// Configures the backports of the release on the mirror that the release itself comes from.
fn add_backports(codename: &str, suite: &str) -> Result<(), Error> {
    let sources = sources::configured(Path::new(ETC_APT));
    if sources::has_suite(&sources, suite) {
        println!("{suite} is configured already.");
        return Ok(());
    }
    let Some(mirror) = sources::mirror(&sources, codename) else {
        return Err(Error::Check {
            what: "No backports can be configured",
            faults: vec![format!(
                "no apt source on this machine serves {codename} main"
            )],
        });
    };
    println!("Adding {suite} from {} as {BACKPORTS_FILE}", mirror.uri);
    fs::write(BACKPORTS_FILE, sources::stanza(mirror, suite)).map_err(|cause| Error::File {
        path: BACKPORTS_FILE.into(),
        cause,
    })?;
    update();
    Ok(())
}

/// Brings the lists of packages up to date. A failure is not the end: another source may be the one that is down,
/// and the installation itself will tell.
pub fn update() {
    println!("Updating the lists of packages (apt-get update)");
    if let Err(error) = process::run(apt_get().args(["-qq", "update"])) {
        println!("warning: {error}");
    }
}

fn get(packages: &[&str], suite: Option<&str>) -> Result<(), Error> {
    // Three lines a package of dpkg's progress tell nobody anything; what goes wrong is said on the error output.
    process::run(install_command(packages, suite).stdout(std::process::Stdio::null()))
}

/// Whether apt would install these, removing nothing.
fn dry_run(packages: &[&str], suite: Option<&str>) -> bool {
    process::succeeds(install_command(packages, suite).arg("--simulate"))
}

fn install_command(packages: &[&str], suite: Option<&str>) -> Command {
    let mut command = apt_get();
    command.args([
        "-qq",
        "-y",
        "-o",
        "Dpkg::Use-Pty=0",
        "--no-install-recommends",
        "--no-remove",
    ]);
    if let Some(suite) = suite {
        command.args(["-t", suite]);
    }
    command.arg("install").args(packages);
    command
}

pub fn apt_get() -> Command {
    let mut command = Command::new("apt-get");
    command.env("DEBIAN_FRONTEND", "noninteractive");
    command
}

fn installed_version(package: &str) -> Option<String> {
    let mut query = Command::new("dpkg-query");
    query
        .args(["-W", "-f", "${Version}", package])
        .stderr(std::process::Stdio::null());
    let output = query.output().ok()?;
    output
        .status
        .success()
        .then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The release's name in a Debian's os-release(5) text; none for other distributions.
fn debian_codename(os_release: &str) -> Option<String> {
    let field = |name: &str| {
        let line = os_release
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix('='))?;
        Some(line.trim_matches('"').to_string())
    };
    field("VERSION_CODENAME").filter(|_| field("ID").as_deref() == Some("debian"))
}

/// Whether this process may install packages: the owner of `/proc/self` is the effective user.
fn is_root() -> bool {
    use std::os::unix::fs::MetadataExt;
    fs::metadata("/proc/self").is_ok_and(|data| data.uid() == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_debian_has_a_codename_for_us() {
        let debian = "NAME=\"Debian GNU/Linux\"\nVERSION_CODENAME=bookworm\nID=debian\n";
        assert_eq!(debian_codename(debian).as_deref(), Some("bookworm"));
        assert_eq!(
            debian_codename("ID=ubuntu\nID_LIKE=debian\nVERSION_CODENAME=noble\n"),
            None
        );
        assert_eq!(debian_codename(""), None);
    }

    #[test]
    fn no_plan_may_remove_a_package() {
        let line = process::line(&install_command(&["nbdkit"], Some("trixie-backports")));
        assert!(line.contains("--no-remove"), "{line}");
        assert!(
            line.ends_with("-t trixie-backports install nbdkit"),
            "{line}"
        );
    }
}
