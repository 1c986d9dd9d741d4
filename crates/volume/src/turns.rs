//! Sharing one slow deed among everybody who asked for it before it began.
//!
//! A sync serves every write that ended before the sync started, so callers who arrive while one is
//! running need one more, and all of them the same one. Whoever gets the turn does the deed for all
//! who had arrived by then. A caller that goes away in the middle simply passes the turn on.

use std::future::Future;
use std::sync::atomic::{AtomicU64, Ordering};

#[derive(Default)]
pub(crate) struct Turns {
    arrived: AtomicU64,
    served: AtomicU64,
    turn: tokio::sync::Mutex<()>,
}

impl Turns {
    /// Returns once a `deed` that began after this call has succeeded: one's own, or another's.
    /// A failed deed is told to its doer alone; the next in line tries again.
    pub async fn once<E>(&self, deed: impl Future<Output = Result<(), E>>) -> Result<(), E> {
        // SeqCst throughout: a caller's writes happen before its arrival is counted, and the deed
        // begins after the count is read.
        let ticket = self.arrived.fetch_add(1, Ordering::SeqCst) + 1;
        let _turn = self.turn.lock().await;
        if self.served.load(Ordering::SeqCst) >= ticket {
            return Ok(());
        }
        let serving = self.arrived.load(Ordering::SeqCst);
        deed.await?;
        self.served.store(serving, Ordering::SeqCst);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use tokio::sync::Notify;

    #[tokio::test]
    async fn callers_during_a_deed_share_exactly_one_more() {
        let turns = Arc::new(Turns::default());
        let gate = Arc::new(Notify::new());
        let deeds = Arc::new(AtomicU64::new(0));
        let call = || {
            let (turns, gate, deeds) = (turns.clone(), gate.clone(), deeds.clone());
            async move {
                turns
                    .once::<()>(async {
                        if deeds.fetch_add(1, Ordering::SeqCst) == 0 {
                            gate.notified().await;
                        }
                        Ok(())
                    })
                    .await
            }
        };
        let first = tokio::spawn(call());
        while deeds.load(Ordering::SeqCst) == 0 {
            tokio::task::yield_now().await;
        }
        let rest: Vec<_> = (0..10).map(|_| tokio::spawn(call())).collect();
        while turns.arrived.load(Ordering::SeqCst) < 11 {
            tokio::task::yield_now().await;
        }
        gate.notify_one();
        first.await.unwrap().unwrap();
        for r in rest {
            r.await.unwrap().unwrap();
        }
        assert_eq!(deeds.load(Ordering::SeqCst), 2);
    }

    #[tokio::test]
    async fn a_doer_that_goes_away_passes_the_turn_on() {
        let turns = Arc::new(Turns::default());
        let stuck = tokio::spawn({
            let turns = turns.clone();
            async move { turns.once::<()>(std::future::pending()).await }
        });
        while turns.arrived.load(Ordering::SeqCst) == 0 {
            tokio::task::yield_now().await;
        }
        let next = tokio::spawn({
            let turns = turns.clone();
            async move { turns.once::<()>(async { Ok(()) }).await }
        });
        stuck.abort();
        next.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_failed_deed_serves_nobody() {
        let turns = Turns::default();
        assert_eq!(turns.once(async { Err("disk") }).await, Err("disk"));
        assert_eq!(turns.once::<&str>(async { Ok(()) }).await, Ok(()));
    }
}
