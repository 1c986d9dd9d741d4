//! Cleaning up when the lab is interrupted (SIGINT, SIGTERM), which runs no destructors.
//!
//! A signal handler may do next to nothing, so ours writes the signal's number into a pipe; a thread
//! reads it, kills the lab's processes, deletes the namespaces of every lab alive, and dies of the same
//! signal as if nothing had been installed. A program that handles a signal itself before its first
//! lab keeps its handler: ending its labs is then up to it. One that installs its own afterwards
//! (tokio's `ctrl_c`) replaces ours for good.

use std::os::fd::IntoRawFd;
use std::sync::atomic::{AtomicI32, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, Once};

use super::sweep::{self, Names};

const SIGNALS: [libc::c_int; 2] = [libc::SIGINT, libc::SIGTERM];

/// Labs alive in this process.
static ALIVE: Mutex<Vec<Names>> = Mutex::new(Vec::new());

/// Where the handler writes; -1 until the pipe is there.
static PIPE: AtomicI32 = AtomicI32::new(-1);

/// The lab's namespaces are removed on an interrupt from now on.
pub(super) fn register(names: &Names) {
    static INSTALL: Once = Once::new();
    INSTALL.call_once(install);
    alive().push(names.clone());
}

pub(super) fn unregister(names: &Names) {
    alive().retain(|known| known != names);
}

fn alive() -> MutexGuard<'static, Vec<Names>> {
    // A list of names: whoever panicked holding it left it whole.
    ALIVE
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// Failing to install is no reason to refuse a lab: the next one sweeps what an interrupt leaves.
fn install() {
    let Ok((reader, writer)) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC) else {
        return;
    };
    let thread = std::thread::Builder::new()
        .name("lab interrupt".to_owned())
        .spawn(move || {
            let mut signal = [0];
            if rustix::io::read(&reader, &mut signal) == Ok(1) {
                clean_up();
                die_of(signal[0].into());
            }
        });
    if thread.is_err() {
        return;
    }
    // Open for as long as the process: the handler may come at any time.
    PIPE.store(writer.into_raw_fd(), Relaxed);
    for signal in SIGNALS {
        if disposition(signal) == Some(libc::SIG_DFL) {
            dispose(
                signal,
                on_signal as extern "C" fn(libc::c_int) as libc::sighandler_t,
            );
        }
    }
}

fn clean_up() {
    crate::process::kill_all_for_exit();
    let alive = alive();
    let names: Vec<&str> = alive.iter().flat_map(Names::all).collect();
    if let Err(error) = sweep::remove(&names) {
        tracing::warn!(%error, "namespaces left behind; the next lab removes them");
    }
    // Last, when nobody writes there any more: the QEMUs have ended with their namespaces.
    crate::pair::folder::remove_all_for_exit();
    // No lab may be made between here and the end.
    std::mem::forget(alive);
}

extern "C" fn on_signal(signal: libc::c_int) {
    let byte = signal as u8;
    // SAFETY: write(2) is async-signal-safe, the byte lives through the call, and the descriptor is
    // either the pipe's, never closed, or -1, which is refused. errno is put back for the code that
    // was interrupted: `__errno_location` is this thread's own and always valid.
    unsafe {
        let errno = *libc::__errno_location();
        libc::write(PIPE.load(Relaxed), (&raw const byte).cast(), 1);
        *libc::__errno_location() = errno;
    }
}

fn disposition(signal: libc::c_int) -> Option<libc::sighandler_t> {
    // SAFETY: all zeroes is a valid sigaction; the call only writes to it.
    unsafe {
        let mut now: libc::sigaction = std::mem::zeroed();
        let result = libc::sigaction(signal, std::ptr::null(), &mut now);
        (result == 0).then_some(now.sa_sigaction)
    }
}

fn dispose(signal: libc::c_int, handler: libc::sighandler_t) {
    // SAFETY: all zeroes is a valid sigaction (empty mask); the handler is SIG_DFL or `on_signal`,
    // which does only what is allowed in a handler.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler;
        action.sa_flags = libc::SA_RESTART;
        libc::sigaction(signal, &action, std::ptr::null_mut());
    }
}

fn die_of(signal: libc::c_int) {
    dispose(signal, libc::SIG_DFL);
    // SAFETY: plain system call; the default action of both signals ends the process.
    unsafe { libc::kill(libc::getpid(), signal) };
}
