//! Comparing disks with their source, without sending them.
//!
//! Stretch by stretch the destination reads back what it stored of the source's content, and sends a
//! digest with the list of units in it; the source computes the same of its frozen disk. Units that the
//! guest has written since the switchover are left out: there the destination is right by definition.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::oneshot;
use whimbrel_engine::space::{Extent, SpaceId};
use whimbrel_volume::VolumeError;
use whimbrel_wire::message::{Message, pack_bitmap};

use super::lane::Mouth;
use crate::disk::Filling;

/// An answer that has not come by then is asked for again: the connection may have broken in between.
const ASK_AGAIN: Duration = Duration::from_secs(15);

/// Why a disk is not verified.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    #[error("{extent} of {space} differ from the source")]
    Differs { space: SpaceId, extent: Extent },
    #[error("{0}")]
    Volume(#[from] VolumeError),
}

/// Answers on their way to whoever asked.
#[derive(Default)]
pub struct Answers {
    waiting: Mutex<BTreeMap<(SpaceId, u64), oneshot::Sender<bool>>>,
}

impl Answers {
    pub fn answer(&self, space: SpaceId, first: u64, same: bool) {
        let mut waiting = self.waiting.lock().expect("no holder of this lock panics");
        if let Some(asker) = waiting.remove(&(space, first)) {
            // An asker that gave up asks again.
            let _ = asker.send(same);
        }
    }

    fn expect(&self, space: SpaceId, first: u64) -> oneshot::Receiver<bool> {
        let (sender, receiver) = oneshot::channel();
        let mut waiting = self.waiting.lock().expect("no holder of this lock panics");
        waiting.insert((space, first), sender);
        receiver
    }
}

/// Verifies a disk that is complete; returns how many units were compared.
pub async fn verify(
    disk: &Filling,
    mouth: &Mouth,
    answers: &Arc<Answers>,
) -> Result<u64, VerifyError> {
    let space = disk.id();
    let mut compared = 0;
    let mut first = 0;
    while let Some(stretch) = disk.stretch(first).await? {
        first = stretch.end();
        let same = loop {
            // Anew each time: the guest may have written more meanwhile.
            let Some(found) = disk.digest(stretch).await? else {
                break true;
            };
            let answer = answers.expect(space, stretch.start);
            mouth
                .say(Message::Digest {
                    space,
                    first: stretch.start,
                    units: stretch.len,
                    packed: pack_bitmap(&found.included),
                    digest: found.digest,
                })
                .await;
            if let Ok(Ok(same)) = tokio::time::timeout(ASK_AGAIN, answer).await {
                compared += found.included.len();
                break same;
            }
        };
        if !same {
            return Err(VerifyError::Differs {
                space,
                extent: stretch,
            });
        }
    }
    Ok(compared)
}
