//! Guests that stand still, because a disk failed or somebody stopped them: why, and letting them go on.
//!
//! Nothing is lost when QEMU pauses one because of a disk: it keeps the request and makes it again when the guest
//! goes on. If what failed it still does, the guest is paused again at once.
//!
//! One that was stopped at a monitor stays so when it moves, and that monitor stays behind: so it can be let go on
//! from here.

use std::time::Duration;

use serde_json::{Value, json};

use crate::api::{ApiError, ErrorCode};
use crate::machine::{Running, drive_name};
use crate::machines::Standing;
use crate::state::Ownership;

/// QEMU's word for a guest that it paused because of a disk.
const IO_ERROR: &str = "io-error";

/// QEMU's words for a guest that somebody stopped; the second once it did not leave by a move that was undone.
const STOPPED: [&str; 2] = ["paused", "postmigrate"];

/// How long a QEMU that is only looked at may take: one whose own thread waits for a page of its guest
/// answers nothing until the page has come.
const LOOK: Duration = Duration::from_secs(2);

/// What QEMU answers to a question, unless it fails or does not answer in time.
pub async fn ask(running: &Running, question: &str) -> Option<Value> {
    let answer = running.qmp.execute(question, json!({}));
    tokio::time::timeout(LOOK, answer).await.ok()?.ok()
}

/// Which disks failed, and how, or that somebody stopped it; `None` if neither is why the guest is paused.
pub async fn reason(standing: &Standing) -> Option<String> {
    let running = standing.running.as_ref().filter(|r| !r.has_ended())?;
    let status = ask(running, "query-status").await?;
    if status["status"] == STOPPED[0] {
        return Some("stopped by hand, here or where it came from".to_string());
    }
    if status["status"] != IO_ERROR {
        return None;
    }
    let blocks = ask(running, "query-block").await;
    let told: Vec<String> = standing
        .spec
        .disks
        .iter()
        .enumerate()
        .filter_map(|(n, disk)| {
            let what = failure(blocks.as_ref()?, &drive_name(n))?;
            Some(format!("volume `{}`: {what}", disk.volume))
        })
        .collect();
    if told.is_empty() {
        return Some("a disk failed a request".to_string());
    }
    Some(told.join("; "))
}

/// What `query-block` says of the disk with this node.
fn failure(blocks: &Value, node: &str) -> Option<&'static str> {
    let block = blocks
        .as_array()?
        .iter()
        .find(|block| block["inserted"]["node-name"] == node)?;
    match block["io-status"].as_str()? {
        "nospace" => Some("no space left"),
        "failed" => Some("I/O error"),
        _ => None,
    }
}

/// Lets the guest go on.
///
/// # Errors
/// `WrongState` for a machine that is not this host's to run, that does not run, or whose guest is not paused.
pub async fn resume(standing: &Standing, migrating: bool) -> Result<(), ApiError> {
    let name = &standing.spec.name;
    let wrong = |what: String| Err(ApiError::new(ErrorCode::WrongState, what));
    match &standing.runtime.ownership {
        Ownership::Departed { .. } => {
            return wrong(format!("machine `{name}` has left this host"));
        }
        // A guest that is about to be stopped for its switchover must not be started in the midst of that.
        Ownership::Local if migrating => return Err(super::busy_migrating(name)),
        Ownership::Local | Ownership::Arriving { .. } => {}
    }
    let Some(running) = standing.running.as_ref().filter(|r| !r.has_ended()) else {
        return wrong(format!("machine `{name}` does not run"));
    };
    let of = |error: whimbrel_qemu::Error| ApiError::new(ErrorCode::Qemu, error.to_string());
    let status = running
        .qmp
        .execute("query-status", json!({}))
        .await
        .map_err(of)?;
    let now = status["status"].as_str().unwrap_or("unknown");
    if now != IO_ERROR && !STOPPED.contains(&now) {
        return wrong(format!(
            "machine `{name}` is not paused by a disk's error or by hand: QEMU says `{now}`"
        ));
    }
    running.qmp.execute("cont", json!({})).await.map_err(of)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_disk_that_failed_is_found_by_its_node() {
        let blocks = json!([
            { "device": "", "inserted": { "node-name": "disk0" }, "io-status": "ok" },
            { "device": "", "inserted": { "node-name": "disk1" }, "io-status": "nospace" },
            { "device": "", "inserted": { "node-name": "disk2" }, "io-status": "failed" },
        ]);
        assert_eq!(failure(&blocks, "disk0"), None);
        assert_eq!(failure(&blocks, "disk1"), Some("no space left"));
        assert_eq!(failure(&blocks, "disk2"), Some("I/O error"));
        assert_eq!(failure(&blocks, "disk3"), None);
    }
}
