//! A network namespace, and entering it: for a child process, or for a thread of our own.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::thread::JoinHandle;

use rustix::fs::{Mode, OFlags};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::LabError;

/// Where `ip netns` keeps its names.
pub(super) const NAMES: &str = "/run/netns";

/// A named namespace, held open. Cheap to clone; it does not delete the name when dropped.
#[derive(Clone, Debug)]
pub struct Namespace {
    name: String,
    fd: Arc<OwnedFd>,
}

impl Namespace {
    /// Opens a namespace that `ip netns add` made.
    pub fn open(name: &str) -> Result<Namespace, LabError> {
        let path = PathBuf::from(NAMES).join(name);
        let fd = rustix::fs::open(&path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).map_err(
            |errno| LabError::Namespace {
                name: name.to_owned(),
                source: errno.into(),
            },
        )?;
        Ok(Namespace {
            name: name.to_owned(),
            fd: Arc::new(fd),
        })
    }

    /// As `ip netns list` shows it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Makes `command`'s process start inside the namespace. Only the network is another; files,
    /// `/sys` and process ids stay the machine's.
    pub fn enter(&self, command: &mut Command) {
        let fd = Arc::clone(&self.fd);
        // SAFETY: runs in the child between fork and exec and makes one system call, on a descriptor
        // the closure keeps open; it allocates nothing and takes no lock.
        unsafe {
            command.pre_exec(
                move || match libc::setns(fd.as_raw_fd(), libc::CLONE_NEWNET) {
                    0 => Ok(()),
                    _ => Err(io::Error::last_os_error()),
                },
            );
        }
    }

    /// Starts a thread that is inside the namespace before it runs `body`. Sockets and devices it opens
    /// belong to the namespace and can be used from any thread.
    pub fn thread<R: Send + 'static>(
        &self,
        purpose: &'static str,
        body: impl FnOnce() -> R + Send + 'static,
    ) -> Result<JoinHandle<Result<R, LabError>>, LabError> {
        let namespace = self.clone();
        std::thread::Builder::new()
            .name(purpose.to_owned())
            .spawn(move || namespace.move_thread_in().map(|()| body()))
            .map_err(|source| LabError::Thread { purpose, source })
    }

    /// Runs `body` inside the namespace and waits for it.
    pub fn run<R: Send>(
        &self,
        purpose: &'static str,
        body: impl FnOnce() -> Result<R, LabError> + Send,
    ) -> Result<R, LabError> {
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new()
                .name(purpose.to_owned())
                .spawn_scoped(scope, || self.move_thread_in().and_then(|()| body()))
                .map_err(|source| LabError::Thread { purpose, source })?;
            match thread.join() {
                Ok(result) => result,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }

    /// Sets a `/proc/sys` value of the namespace, e.g. `net/ipv4/tcp_congestion_control`. A key that
    /// this kernel does not have counts as set: there is nothing to turn on or off.
    pub fn sysctl(&self, values: &[(&str, &str)]) -> Result<(), LabError> {
        self.run("sysctl", || {
            for &(key, value) in values {
                match std::fs::write(PathBuf::from("/proc/sys").join(key), value) {
                    Err(source) if source.kind() != io::ErrorKind::NotFound => {
                        return Err(LabError::Sysctl {
                            key: key.to_owned(),
                            value: value.to_owned(),
                            source,
                        });
                    }
                    _ => {}
                }
            }
            Ok(())
        })
    }

    fn move_thread_in(&self) -> Result<(), LabError> {
        move_into_link_name_space(self.fd.as_fd(), Some(LinkNameSpaceType::Network)).map_err(
            |errno| LabError::Namespace {
                name: self.name.clone(),
                source: errno.into(),
            },
        )
    }
}
