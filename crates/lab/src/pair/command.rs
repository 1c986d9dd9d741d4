//! Saying `whimbrel ...` and understanding the answer.

use super::PairError;
use super::answers::{ErrorAnswer, Failure};
use super::follow::Follow;
use crate::guest::workspace;
use serde::de::DeserializeOwned;
use std::fmt;
use std::io::Read;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// How long a command that only asks or orders may take. Importing a gigabyte is the longest.
const PATIENCE: Duration = Duration::from_secs(120);

const POLL: Duration = Duration::from_millis(5);

/// The program: `WHIMBREL_BIN`, otherwise the release build in the checkout's target folder.
pub fn whimbrel_program() -> Result<PathBuf, PairError> {
    let path = match std::env::var_os("WHIMBREL_BIN") {
        Some(path) => PathBuf::from(path),
        None => match std::env::var_os("CARGO_TARGET_DIR") {
            Some(dir) => workspace().join(dir),
            None => workspace().join("target"),
        }
        .join("release/whimbrel"),
    };
    if !path.is_file() {
        return Err(PairError::NoProgram { path });
    }
    std::path::absolute(&path).map_err(PairError::io("find", path))
}

/// A command that failed.
#[derive(Clone, Debug)]
pub struct Refusal {
    pub command: String,
    /// `None` if a signal ended it.
    pub exit: Option<i32>,
    /// What it said with `--json`.
    pub error: Option<ErrorAnswer>,
    /// All of its standard error.
    pub stderr: String,
}

impl Refusal {
    pub(super) fn read(command: &str, exit: Option<i32>, stderr: String) -> Refusal {
        // Notes may come before the error; the error is the last line.
        let failure: Option<Failure> = stderr
            .lines()
            .rev()
            .find_map(|line| serde_json::from_str(line).ok());
        Refusal {
            command: command.to_owned(),
            exit,
            error: failure.map(|failure| failure.error),
            stderr,
        }
    }

    pub fn is_not_found(&self) -> bool {
        self.error.as_ref().is_some_and(|e| e.code == "not-found")
    }

    /// The error's code and sentence, or what else was said.
    pub fn what(&self) -> String {
        match &self.error {
            Some(error) => format!("{}: {}", error.code, error.what),
            None => self.stderr.trim().to_owned(),
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let exit = self
            .exit
            .map_or("by a signal".to_owned(), |e| e.to_string());
        write!(f, "`{}` failed ({exit}): {}", self.command, self.what())?;
        let error = self.error.as_ref();
        let parts = [
            ("state", error.and_then(|e| e.machine_state.as_deref())),
            ("next", error.and_then(|e| e.next_step.as_deref())),
        ];
        for (word, part) in parts {
            if let Some(part) = part {
                write!(f, "; {word}: {part}")?;
            }
        }
        Ok(())
    }
}

/// The command with one host's configuration.
#[derive(Clone, Debug)]
pub struct Whimbrel {
    program: PathBuf,
    config: PathBuf,
}

impl Whimbrel {
    pub(super) fn new(program: &Path, config: &Path) -> Whimbrel {
        Whimbrel {
            program: program.to_owned(),
            config: config.to_owned(),
        }
    }

    /// The command's beginning, without `--json`.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command.arg("--config").arg(&self.config).args(args);
        command.stdin(Stdio::null());
        command
    }

    /// Runs it with `--json` to its end; its standard output.
    pub fn run(&self, args: &[&str]) -> Result<String, PairError> {
        let mut command = self.command(args);
        command.arg("--json");
        run(command, &shown(args), PATIENCE)
    }

    /// Runs it as a person would; its standard output.
    pub fn run_for_people(&self, args: &[&str]) -> Result<String, PairError> {
        run(self.command(args), &shown(args), PATIENCE)
    }

    /// Runs it and understands the last line of its answer.
    pub fn answer<T: DeserializeOwned>(&self, args: &[&str]) -> Result<T, PairError> {
        let output = self.run(args)?;
        let line = output.lines().rev().find(|l| !l.trim().is_empty());
        let line = line.unwrap_or_default();
        serde_json::from_str(line).map_err(|source| PairError::Answer {
            command: shown(args),
            answer: line.to_owned(),
            source,
        })
    }

    /// Starts a command that tells of a migration until it is over (`migrate`, `watch`).
    pub fn follow(&self, args: &[&str]) -> Result<Follow, PairError> {
        let mut command = self.command(args);
        command.arg("--json");
        Follow::start(command, shown(args))
    }
}

/// Makes a command end with the thread that started it, however that ends: an interrupt of the laboratory
/// runs no destructors.
pub(super) fn bind_to_this_thread(command: &mut Command) {
    // SAFETY: runs in the child between fork and exec and makes one system call (prctl), which allocates
    // nothing and takes no lock.
    unsafe {
        command.pre_exec(|| {
            rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
            Ok(())
        });
    }
}

fn shown(args: &[&str]) -> String {
    format!("whimbrel {}", args.join(" "))
}

fn run(mut command: Command, shown: &str, within: Duration) -> Result<String, PairError> {
    let failed = |source| PairError::Start {
        command: shown.to_owned(),
        source,
    };
    bind_to_this_thread(&mut command);
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    // Each pipe has a reader of its own, so that neither fills up while the other is read.
    let stdout = child.stdout.take().map(reader);
    let stderr = child.stderr.take().map(reader);
    let deadline = Instant::now() + within;
    let status = loop {
        if let Some(status) = child.try_wait().map_err(failed)? {
            break status;
        }
        if Instant::now() >= deadline {
            let _ = child.kill();
            let _ = child.wait();
            return Err(PairError::Timeout {
                command: shown.to_owned(),
                after: within,
            });
        }
        std::thread::sleep(POLL);
    };
    let text = |reader: Option<std::thread::JoinHandle<String>>| {
        reader.and_then(|r| r.join().ok()).unwrap_or_default()
    };
    let (stdout, stderr) = (text(stdout), text(stderr));
    if status.success() {
        return Ok(stdout);
    }
    let refusal = Refusal::read(shown, status.code(), stderr);
    Err(PairError::Refused(Box::new(refusal)))
}

/// Reads a pipe to its end.
pub(super) fn reader(mut pipe: impl Read + Send + 'static) -> std::thread::JoinHandle<String> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        // What came before an error is what there is.
        let _ = pipe.read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_error_is_the_last_line_that_is_one() {
        let stderr =
            "a note\n{\"error\":{\"code\":\"not-found\",\"what\":\"no such thing\"},\"exit\":1}\n";
        let refusal = Refusal::read("whimbrel x", Some(1), stderr.to_owned());
        assert!(refusal.is_not_found());
        assert_eq!(refusal.what(), "not-found: no such thing");
        let other = Refusal::read("whimbrel x", None, "killed\n".to_owned());
        assert_eq!(other.what(), "killed");
    }
}
