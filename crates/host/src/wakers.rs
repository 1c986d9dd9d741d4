//! Tasks that wait for the engine's tickets.

use std::collections::HashMap;

use tokio::sync::oneshot;
use whimbrel_engine::inflow::Ticket;
use whimbrel_nbd::Errno;

/// Who waits for which ticket. Kept under the same lock as the engine's state that gives tickets out and
/// calls them back, so that none is called before somebody listens.
#[derive(Default)]
pub struct Wakers(HashMap<Ticket, oneshot::Sender<Result<(), Errno>>>);

impl Wakers {
    /// Resolves when the ticket is called. The error of a closed channel means the same: whoever held it
    /// is gone, ask again.
    pub fn register(&mut self, ticket: Ticket) -> oneshot::Receiver<Result<(), Errno>> {
        let (waker, wait) = oneshot::channel();
        self.0.insert(ticket, waker);
        wait
    }

    pub fn wake(&mut self, tickets: &[Ticket]) {
        self.tell(tickets, Ok(()));
    }

    /// What these waited for will not come.
    pub fn fail(&mut self, tickets: &[Ticket], errno: Errno) {
        self.tell(tickets, Err(errno));
    }

    fn tell(&mut self, tickets: &[Ticket], what: Result<(), Errno>) {
        for ticket in tickets {
            if let Some(waker) = self.0.remove(ticket) {
                // A request whose client has gone does not listen any more.
                let _ = waker.send(what);
            }
        }
    }
}
