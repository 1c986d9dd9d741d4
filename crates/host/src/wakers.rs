//! Tasks that wait for the engine's tickets.

use std::collections::HashMap;

use tokio::sync::oneshot;
use whimbrel_engine::inflow::Ticket;

/// Who waits for which ticket. Kept under the same lock as the engine's state that gives tickets out and
/// calls them back, so that none is called before somebody listens.
#[derive(Default)]
pub struct Wakers(HashMap<Ticket, oneshot::Sender<()>>);

impl Wakers {
    /// Resolves when the ticket is called. The error of a closed channel means the same: whoever held it
    /// is gone, ask again.
    pub fn register(&mut self, ticket: Ticket) -> oneshot::Receiver<()> {
        let (waker, wait) = oneshot::channel();
        self.0.insert(ticket, waker);
        wait
    }

    pub fn wake(&mut self, tickets: &[Ticket]) {
        for ticket in tickets {
            if let Some(waker) = self.0.remove(ticket) {
                // A request whose client has gone does not listen any more.
                let _ = waker.send(());
            }
        }
    }
}
