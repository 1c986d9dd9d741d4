//! Looking at the source's disks before they are ours.
//!
//! A QEMU that waits for a machine opens its disks at once and may read a sector to learn their geometry.
//! What it reads then must be the source's, and must not be kept: the source still writes.

use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use tokio::sync::oneshot;
use whimbrel_engine::space::SpaceId;
use whimbrel_wire::message::{MAX_PEEK, Message};

use super::lane::Mouth;
use crate::disk::Peek;

/// Looks under way; one more is refused. A QEMU does one at a time for each disk.
const MAX_LOOKS: usize = 256;

/// The looks of one session.
#[derive(Default)]
pub struct Peeks {
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    next: u64,
    waiting: HashMap<u64, oneshot::Sender<Option<Bytes>>>,
}

impl Peeks {
    fn inner(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.inner.lock().expect("no holder of this lock panics")
    }

    pub fn answer(&self, id: u64, bytes: Option<Vec<u8>>) {
        if let Some(waiting) = self.inner().waiting.remove(&id) {
            // Whoever looked may have gone.
            let _ = waiting.send(bytes.map(Bytes::from));
        }
    }

    /// The link is down: nobody answers any more.
    pub fn forget_all(&self) {
        self.inner().waiting.clear();
    }
}

/// One disk, seen through a session.
pub struct DiskPeek {
    pub space: SpaceId,
    pub peeks: Arc<Peeks>,
    pub mouth: Mouth,
}

impl Peek for DiskPeek {
    fn peek(
        &self,
        offset: u64,
        len: u32,
    ) -> Pin<Box<dyn Future<Output = Option<Bytes>> + Send + '_>> {
        Box::pin(async move {
            if len > MAX_PEEK {
                return None;
            }
            let (id, answer) = {
                let mut inner = self.peeks.inner();
                if inner.waiting.len() == MAX_LOOKS {
                    return None;
                }
                inner.next += 1;
                let id = inner.next;
                let (sender, answer) = oneshot::channel();
                inner.waiting.insert(id, sender);
                (id, answer)
            };
            self.mouth
                .say(Message::Peek {
                    id,
                    space: self.space,
                    offset,
                    len,
                })
                .await;
            let bytes = answer.await.ok().flatten()?;
            (bytes.len() == len as usize).then_some(bytes)
        })
    }
}
