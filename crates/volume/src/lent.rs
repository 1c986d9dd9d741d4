//! Threads that serve one client, and may be held up for it.
//!
//! On the async runtime nothing may wait for a disk, so a request that might wait goes to another thread:
//! two wake-ups, which on a small request cost several times the request. A thread that has been lent has
//! nobody else to serve. There small requests are done on the spot, and what must wait for a disk goes to
//! a ring of the thread's own, whose completions the same thread collects.
//!
//! How long such a thread can be held up is bounded for writes by `Patience`: one that was
//! found slow sends the next ones to the pool. Reads never wait on it.

use std::cell::Cell;

std::thread_local! {
    static LENT: Cell<bool> = const { Cell::new(false) };
}

/// Says that the calling thread serves one client alone, from now to its end. If it runs a
/// current-thread runtime of tokio, its requests may also use a ring of its own.
pub fn lend_this_thread() {
    LENT.set(true);
}

pub(crate) fn is_lent() -> bool {
    LENT.get()
}
