//! Reads and writes that wait for a disk, on a lent thread: an io_uring of the thread's own.
//!
//! No other thread takes part. A request is gathered; when the thread's tasks have run dry, a task of
//! ours hands over all that has gathered with one system call, and when the ring's descriptor becomes
//! readable the same task collects what is done and wakes those that wait for it.
//!
//! ```text
//! connection's task:  32 requests  -> gather, gather, ...           (no system call)
//! our task:           submit once; wait for the descriptor; collect -> wakes the connection's task
//! ```
//!
//! A ring is made when a lent thread first needs one and lives as long as the thread; where the system
//! has none or refuses it, [`submit`] gives every request back, and its caller takes the pool.
//!
//! Bound: [`kernel::DEPTH`] requests of a thread; past it `submit` gives them back too.
//!
//! The traps. A future that is dropped leaves its request running: the ring owns the buffer until the
//! kernel is done with it. The thread ends only when the last request has completed.

mod kernel;

use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use rustix::io::Errno;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::runtime::{Handle, RuntimeFlavor};
use tokio::sync::oneshot;

use crate::buffers::Buffer;
use crate::lent;
use kernel::{Content, Kernel, Op};

/// Held until a request is done, whoever still waits for it.
pub(crate) type Hold = Arc<tokio::sync::OwnedRwLockReadGuard<()>>;

/// How a request ended: bytes done, and the buffer if it was a read.
pub(crate) type Finished = (io::Result<usize>, Option<Buffer>);

struct Tag {
    done: oneshot::Sender<Finished>,
    _hold: Option<Hold>,
}

struct Ring {
    kernel: Kernel<Tag>,
    /// The task that hands over and collects, while it sleeps.
    task: Option<Waker>,
}

enum State {
    Untried,
    Refused,
    Running(Box<Ring>),
}

std::thread_local! {
    static RING: RefCell<State> = const { RefCell::new(State::Untried) };
}

/// Reads into the buffer from its byte `from` on, which is at `offset` in the file.
pub(crate) fn read(
    file: &Arc<File>,
    offset: u64,
    buffer: Buffer,
    from: usize,
) -> Result<oneshot::Receiver<Finished>, Buffer> {
    submit(file, offset, Content::Into { buffer, from }, None).map_err(|op| match op.content {
        Content::Into { buffer, .. } => buffer,
        Content::From(_) => unreachable!("a read comes back as one"),
    })
}

/// Writes the bytes. `hold` is given up when that is done. `None`: this thread's ring did not take it.
pub(crate) fn write(
    file: &Arc<File>,
    offset: u64,
    bytes: Bytes,
    hold: Hold,
) -> Option<oneshot::Receiver<Finished>> {
    submit(file, offset, Content::From(bytes), Some(hold)).ok()
}

fn submit(
    file: &Arc<File>,
    offset: u64,
    content: Content,
    hold: Option<Hold>,
) -> Result<oneshot::Receiver<Finished>, Op<Tag>> {
    let (done, finished) = oneshot::channel();
    let op = Op {
        file: Arc::clone(file),
        offset,
        content,
        tag: Tag { done, _hold: hold },
    };
    RING.with_borrow_mut(|state| {
        if let State::Untried = state {
            *state = start();
        }
        let State::Running(ring) = state else {
            return Err(op);
        };
        ring.kernel.gather(op)?;
        if let Some(task) = ring.task.take() {
            task.wake();
        }
        Ok(finished)
    })
}

/// Makes this thread's ring and the task that drives it.
fn start() -> State {
    let own_runtime = Handle::try_current()
        .is_ok_and(|handle| handle.runtime_flavor() == RuntimeFlavor::CurrentThread);
    if !lent::is_lent() || !own_runtime {
        // Asked again and again it would cost time; a thread's nature does not change.
        return State::Refused;
    }
    let made = Kernel::new().and_then(|kernel| {
        let descriptor = kernel.descriptor()?;
        // SAFETY: the descriptor is ours alone, and stays open and the same until the `AsyncFd`, which
        // owns it and does not give it out to be changed, is dropped.
        let fd = unsafe { AsyncFd::register_with_interest(descriptor, Interest::READABLE) }?;
        Ok((kernel, fd))
    });
    match made {
        Ok((kernel, fd)) => {
            tokio::spawn(drive(fd));
            State::Running(Box::new(Ring { kernel, task: None }))
        }
        Err(error) => {
            tracing::debug!(%error, "no io_uring; disk I/O waits on the pool's threads");
            State::Refused
        }
    }
}

/// Whether this thread has a ring.
#[cfg(test)]
pub(crate) fn is_running() -> bool {
    RING.with_borrow(|state| matches!(state, State::Running(_)))
}

async fn drive(fd: AsyncFd<OwnedFd>) {
    std::future::poll_fn(|cx| RING.with_borrow_mut(|state| turn(state, &fd, cx))).await
}

/// Hands over, collects, and arranges to be woken.
fn turn(state: &mut State, fd: &AsyncFd<OwnedFd>, cx: &mut Context<'_>) -> Poll<()> {
    let State::Running(ring) = state else {
        return Poll::Ready(());
    };
    loop {
        let submitted = ring.kernel.submit();
        ring.kernel.collect(|op, result| {
            let buffer = match op.content {
                Content::Into { buffer, .. } => Some(buffer),
                Content::From(_) => None,
            };
            // Nobody may be waiting any more; what is done is done.
            let _ = op.tag.done.send((result, buffer));
        });
        match submitted.map_err(|error| Errno::from_io_error(&error).ok_or(error)) {
            Ok(()) => {}
            // The kernel is short of something for the moment.
            Err(Ok(Errno::AGAIN | Errno::BUSY | Errno::INTR)) => cx.waker().wake_by_ref(),
            Err(error) => {
                tracing::error!(
                    ?error,
                    "io_uring failed; disk I/O waits on the pool's threads"
                );
                *state = State::Refused;
                return Poll::Ready(());
            }
        }
        match fd.poll_read_ready(cx) {
            Poll::Ready(Ok(mut guard)) => guard.clear_ready(),
            Poll::Ready(Err(_)) => {
                *state = State::Refused;
                return Poll::Ready(());
            }
            Poll::Pending => {
                ring.task = Some(cx.waker().clone());
                return Poll::Pending;
            }
        }
    }
}
