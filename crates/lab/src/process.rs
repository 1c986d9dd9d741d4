//! Child processes of the lab: daemons, QEMU. Each is known by its pid, writes its output to a file, and
//! does not outlive its handle.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};

use crate::LabError;

/// How long a process may take to end after SIGTERM before it gets SIGKILL, when its handle is dropped.
pub const TERM_GRACE: Duration = Duration::from_secs(2);

/// How often a wait looks.
const POLL: Duration = Duration::from_millis(5);

/// Process groups that are alive, for the interrupt to end. Bounded by what is running.
static GROUPS: Mutex<BTreeSet<i32>> = Mutex::new(BTreeSet::new());

/// A running (or ended) child in a process group of its own: a Ctrl-C at the terminal reaches the lab,
/// which then ends its children in order.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    pid: Pid,
    log: PathBuf,
    ended: Option<ExitStatus>,
}

impl Process {
    /// Starts `command` with no input and with both outputs appended to the file `log`.
    pub fn spawn(name: &str, mut command: Command, log: &Path) -> Result<Process, LabError> {
        let broken = |source| LabError::Log {
            path: log.to_owned(),
            source,
        };
        let output = File::options()
            .create(true)
            .append(true)
            .open(log)
            .map_err(broken)?;
        let errors = output.try_clone().map_err(broken)?;
        command
            .stdin(Stdio::null())
            .stdout(output)
            .stderr(errors)
            .process_group(0);
        // Held over the start, so that an interrupt finds the child or prevents it.
        let mut groups = groups();
        let child = command.spawn().map_err(|source| LabError::Start {
            command: format!("{command:?}"),
            source,
        })?;
        let pid = Pid::from_child(&child);
        groups.insert(pid.as_raw_nonzero().get());
        drop(groups);
        Ok(Process {
            name: name.to_owned(),
            child,
            pid,
            log: log.to_owned(),
            ended: None,
        })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The file of its output.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// What it has written so far, invalid UTF-8 replaced; for messages of failed tests.
    pub fn output(&self) -> String {
        let bytes = std::fs::read(&self.log).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    pub fn is_running(&mut self) -> Result<bool, LabError> {
        Ok(self.status()?.is_none())
    }

    /// Its exit status, if it has ended.
    pub fn status(&mut self) -> Result<Option<ExitStatus>, LabError> {
        if self.ended.is_none() {
            let status = self.child.try_wait();
            self.ended = status.map_err(|source| self.failed("wait", source))?;
            if self.ended.is_some() {
                self.forget();
            }
        }
        Ok(self.ended)
    }

    /// Waits for its end.
    pub fn wait(&mut self, within: Duration) -> Result<ExitStatus, LabError> {
        let deadline = Instant::now() + within;
        loop {
            if let Some(status) = self.status()? {
                return Ok(status);
            }
            if Instant::now() >= deadline {
                return Err(LabError::StillRunning {
                    name: self.name.clone(),
                    pid: self.pid(),
                    after: within,
                });
            }
            std::thread::sleep(POLL);
        }
    }

    /// Sends a signal to it and its own children. To one that has ended: nothing, and no error.
    pub fn signal(&mut self, signal: Signal) -> Result<(), LabError> {
        // Not yet waited for, so the number cannot belong to anyone else.
        if self.status()?.is_some() {
            return Ok(());
        }
        rustix::process::kill_process_group(self.pid, signal)
            .map_err(|errno| self.failed("kill", errno.into()))
    }

    /// SIGKILL, and its end awaited: power cut off.
    pub fn kill9(&mut self) -> Result<ExitStatus, LabError> {
        self.signal(Signal::KILL)?;
        // Not even a stopped process survives it; the bound is for one stuck in the kernel.
        self.wait(Duration::from_secs(30))
    }

    /// SIGTERM, then SIGKILL if it still runs after `grace`.
    pub fn end(&mut self, grace: Duration) -> Result<ExitStatus, LabError> {
        self.signal(Signal::TERM)?;
        match self.wait(grace) {
            Err(LabError::StillRunning { .. }) => self.kill9(),
            ended => ended,
        }
    }

    fn failed(&self, step: &'static str, source: io::Error) -> LabError {
        LabError::Process {
            name: self.name.clone(),
            pid: self.pid(),
            step,
            source,
        }
    }

    fn forget(&self) {
        groups().remove(&self.pid.as_raw_nonzero().get());
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Err(error) = self.end(TERM_GRACE) {
            tracing::warn!(%error, "a process of the lab could not be ended");
        }
        self.forget();
    }
}

fn groups() -> MutexGuard<'static, BTreeSet<i32>> {
    // A set of numbers: whoever panicked holding it left it whole.
    GROUPS
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// SIGKILL for every process of this lab process, for the way out on an interrupt. Keeps the lock, so
/// that none is started after.
pub(crate) fn kill_all_for_exit() {
    let groups = groups();
    for &group in groups.iter() {
        if let Some(group) = Pid::from_raw(group) {
            let _ = rustix::process::kill_process_group(group, Signal::KILL);
        }
    }
    std::mem::forget(groups);
}
