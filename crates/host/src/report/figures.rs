//! What is told beside the figures: what they leave out.

use crate::api::types::{Direction, MigrationView, Summary, TimelineView};

/// Units sent over those that had to be; nothing if none had to.
pub fn ratio(sent: u64, live: u64) -> Option<f64> {
    (live > 0).then(|| sent as f64 / live as f64)
}

/// What only the other end knows, or nobody any more.
pub fn elsewhere(view: &MigrationView, summary: &Summary, timeline: &TimelineView) -> Vec<String> {
    let peer = &view.peer;
    let mut said = Vec::new();
    match view.direction {
        Direction::Incoming => said.push(format!(
            "only {peer} knows when the guest was stopped, and so the whole blackout; how content was written, \
             how often it was sent, and what held push back. Bytes are those received here"
        )),
        Direction::Outgoing => said.push(format!(
            "only {peer} knows how long demands took over time, and what the guest felt while there was no link"
        )),
    }
    said.push(
        "how long the guest's requests took is known from when it runs at the destination until its disks are there"
            .to_string(),
    );
    if summary.restarts > 0 && view.direction == Direction::Outgoing {
        said.push(
            "a daemon was restarted meanwhile: what it had counted since it last wrote is lost, and the final report tells \
             of the last daemon only"
                .to_string(),
        );
    }
    if timeline.damaged_lines > 0 {
        said.push(format!(
            "{} lines of the record were torn or damaged and are left out",
            timeline.damaged_lines
        ));
    }
    if timeline.stretches.is_empty() {
        said.push("nothing was recorded over time, or the record was removed since".to_string());
    }
    said
}
