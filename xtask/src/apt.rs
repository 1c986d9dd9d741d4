//! Installs Debian packages with apt.
//!
//! The trap is QEMU. The release's may be too old for the laboratory ([`crate::qemu`]). And `qemu-system-x86` and
//! `qemu-utils` must be of one version: a newer `qemu-utils` breaks an older `qemu-system-x86`, and on machines whose
//! `qemu-utils` came from the backports the release's `qemu-system-x86` can therefore not be installed. So every plan
//! is tried dry first. If the release's QEMU is too old or does not go in, both packages come from the release's
//! backports, which are configured for it if they are not. No plan may remove a package: this is somebody's machine.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::error::Error;
use crate::needs::{Need, QEMU_SYSTEM, QEMU_UTILS};
use crate::process;
use crate::qemu;
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
    let wants_qemu = packages.contains(&QEMU_SYSTEM);
    if let (true, Some(version)) = (wants_qemu, qemu::installed()) {
        println!(
            "{} is QEMU {version}, and {} is needed: {}.",
            qemu::place(),
            qemu::OLDEST,
            qemu::WHY_NOT_OLDER
        );
    }
    let by_hand = |mut why: String| {
        if wants_qemu {
            why.push_str(&format!(
                "\nWithout QEMU {} or newer the demo cannot run: {}.\nDebian 12 has one in bookworm-backports only \
                 (`-t bookworm-backports`).",
                qemu::OLDEST,
                qemu::WHY_NOT_OLDER
            ));
        }
        Error::ByHand {
            why,
            packages: packages.clone(),
        }
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
    let (of_qemu, others): (Vec<&str>, Vec<&str>) = packages
        .iter()
        .partition(|name| [QEMU_SYSTEM, QEMU_UTILS].contains(name));
    if !others.is_empty() {
        println!(
            "Installing from the configured sources: {}",
            others.join(" ")
        );
        get(&others, None).map_err(|error| by_hand(error.to_string()))?;
    }
    if !of_qemu.is_empty() {
        install_qemu(&of_qemu, &codename).map_err(|error| by_hand(error.to_string()))?;
    }
    match needs.iter().find(|need| !need.is_present()) {
        None => Ok(()),
        Some(need) if need.package == QEMU_SYSTEM && qemu::installed().is_some() => {
            Err(by_hand(format!(
                "apt installed {QEMU_SYSTEM}, but {} is an older one still.",
                qemu::place()
            )))
        }
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
    let released = qemu::candidate(QEMU_SYSTEM, None);
    let is_old = packages.contains(&QEMU_SYSTEM) && !qemu::will_do(released);
    if !is_old && dry_run(packages, None) {
        println!(
            "Installing from the configured sources: {}",
            packages.join(" ")
        );
        return get(packages, None);
    }
    let suite = format!("{codename}-backports");
    if is_old {
        println!(
            "The configured sources have {} for {codename}, which is too old. So both QEMU packages come from {suite}.",
            named(released)
        );
    } else {
        println!(
            "The {} of {codename} cannot be installed beside what is there{}.\n\
             So both QEMU packages come from {suite}, in one version.",
            packages.join(" and "),
            installed_version(QEMU_UTILS)
                .map(|version| format!(" ({QEMU_UTILS} {version})"))
                .unwrap_or_default(),
        );
    }
    add_backports(codename, &suite)?;
    let backported = qemu::candidate(QEMU_SYSTEM, Some(&suite));
    if is_old && !qemu::will_do(backported) {
        // Left as it is: an old QEMU would be installed for nothing.
        return Err(Error::Check {
            what: "No QEMU that is new enough can be had",
            faults: vec![format!(
                "the configured sources have {}, {suite} has {}",
                named(released),
                named(backported)
            )],
        });
    }
    // Both, although one may be there: apt must be free to bring it to the same version.
    get(&[QEMU_SYSTEM, QEMU_UTILS], Some(&suite))
}

fn named(version: Option<qemu::Version>) -> String {
    version.map_or_else(|| "no QEMU".into(), |version| format!("QEMU {version}"))
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
