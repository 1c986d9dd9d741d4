//! The `ip` command (iproute2), in batches: one process for a namespace's whole set-up.

use std::io::Write;
use std::process::{Command, Stdio};

use crate::LabError;

/// Runs `ip`'s command lines in one go, inside a namespace if one is named. Stops at the first that
/// fails; the error holds that line.
pub(super) fn batch<L: AsRef<str>>(namespace: Option<&str>, lines: &[L]) -> Result<(), LabError> {
    let mut command = Command::new("ip");
    if let Some(namespace) = namespace {
        command.args(["-n", namespace]);
    }
    feed(command, namespace, lines).map(drop)
}

/// Runs them all, whichever fail; the error is about some of those.
pub(super) fn batch_all<L: AsRef<str>>(lines: &[L]) -> Result<(), LabError> {
    let mut command = Command::new("ip");
    command.arg("-force");
    feed(command, None, lines).map(drop)
}

/// Names of the namespace's devices that carry traffic. The kernel finds that out some time after a
/// device was set up, and drops what is sent before.
pub(super) fn devices_up(namespace: &str) -> Result<Vec<String>, LabError> {
    let mut command = Command::new("ip");
    command.args(["-n", namespace, "-brief"]);
    let output = feed(command, Some(namespace), &["link show"])?;
    Ok(output.lines().filter_map(device_up).collect())
}

fn feed<L: AsRef<str>>(
    mut command: Command,
    namespace: Option<&str>,
    lines: &[L],
) -> Result<String, LabError> {
    command.args(["-batch", "-"]);
    let shown = |line: &str| match namespace {
        Some(namespace) => format!("ip -n {namespace} {line}"),
        None => format!("ip {line}"),
    };
    let start = |source| LabError::Start {
        command: shown("-batch -"),
        source,
    };
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(start)?;
    let text: String = lines
        .iter()
        .flat_map(|line| [line.as_ref(), "\n"])
        .collect();
    if let Some(mut stdin) = child.stdin.take() {
        // Broken pipe: it has failed at an earlier line, which its status tells below.
        let _ = stdin.write_all(text.as_bytes());
    }
    let output = child.wait_with_output().map_err(start)?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let stderr = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    let failed = failed_line(&stderr).and_then(|number| lines.get(number - 1));
    Err(LabError::Command {
        command: shown(failed.map_or("-batch -", |line| line.as_ref())),
        status: output.status,
        stderr,
    })
}

/// The line's number, from 1, in iproute2's `Command failed -:3`.
fn failed_line(stderr: &str) -> Option<usize> {
    let (_, number) = stderr.rsplit_once("Command failed -:")?;
    number.trim().parse().ok().filter(|&number| number > 0)
}

/// The device's name in a line of `ip -brief link` (`lan@if3  UP  ...`), if it is up.
fn device_up(line: &str) -> Option<String> {
    let mut words = line.split_whitespace();
    let name = words.next()?.split('@').next()?;
    (words.next()? == "UP").then(|| name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_up_when_ip_says_so() {
        let up = "lan@if3          UP             7e:6f:7c:fb:73:6d <BROADCAST,UP,LOWER_UP>";
        assert_eq!(device_up(up).as_deref(), Some("lan"));
        assert_eq!(
            device_up("br0  LOWERLAYERDOWN 3a:00:00:00:00:01 <UP>"),
            None
        );
        assert_eq!(device_up(""), None);
    }

    #[test]
    fn the_failed_line_is_found_in_the_complaint() {
        let complaint = "Cannot find device \"x\"\nCommand failed -:3";
        assert_eq!(failed_line(complaint), Some(3));
        assert_eq!(failed_line("Command failed -:0"), None);
        assert_eq!(failed_line("no permission"), None);
    }
}
