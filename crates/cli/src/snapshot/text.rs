//! Snapshots for people.

use super::Item;
use crate::output::{pairs, table};
use crate::show::bytes;
use whimbrel_host::api::SnapshotView;
use whimbrel_repository::verify::Verified;

/// So many damaged objects are told of in words; with `--json` there are more.
const MOST_TOLD: usize = 20;

pub fn list(items: &[Item]) -> String {
    let rows: Vec<_> = items
        .iter()
        .map(|item| {
            [
                item.name.to_string(),
                item.machine.clone(),
                item.taken.clone(),
                bytes(item.volumes.iter().map(|v| v.size).sum()),
                item.consistency.to_string(),
            ]
        })
        .collect();
    table(["NAME", "MACHINE", "TAKEN", "SIZE", "STATE"], &rows)
}

pub fn one(item: &Item) -> String {
    let mut text = pairs(&[
        ("name", item.name.to_string()),
        ("uuid", item.uuid.clone()),
        ("machine", item.machine.clone()),
        ("host", item.host.clone()),
        ("taken", item.taken.clone()),
        ("state", item.consistency.to_string()),
        (
            "changes of",
            item.parent
                .as_ref()
                .map_or(String::new(), |p| p.to_string()),
        ),
    ]);
    for volume in &item.volumes {
        let (name, size) = (&volume.name, volume.size);
        text.push_str(&format!("\nvolume {name}: {} ({size} bytes)", bytes(size)));
    }
    text
}

pub fn made(made: &SnapshotView) -> String {
    let mut text = format!(
        "snapshot {} of {} is in {}\n  {}, as of {}\n  the guest's disks stood still for {:.1} ms; {} stored in {:.1} s",
        made.name,
        made.machine,
        made.repository.display(),
        made.consistency,
        made.taken,
        made.pause_us as f64 / 1e3,
        bytes(made.stored_bytes),
        made.took_ms as f64 / 1e3,
    );
    for volume in &made.volumes {
        let (name, size) = (&volume.name, bytes(volume.size));
        text.push_str(&match &volume.whole_because {
            None => format!(
                "\n  volume {name}: {} of {size} looked at",
                bytes(volume.looked_at)
            ),
            Some(why) => format!("\n  volume {name}: all of {size} looked at: {why}"),
        });
    }
    text
}

pub fn verified(verified: &Verified) -> String {
    let mut text = format!(
        "{} snapshots, {} of content in {} extents read",
        verified.snapshots,
        bytes(verified.content_bytes),
        verified.extents
    );
    if verified.damaged == 0 {
        text.push_str("; nothing is damaged");
        return text;
    }
    text.push_str(&format!("; {} objects are damaged", verified.damaged));
    for fault in verified.faults.iter().take(MOST_TOLD) {
        text.push_str(&format!("\n! {}: {}", fault.object, fault.what));
        let names: Vec<_> = fault.snapshots.iter().map(|s| s.as_str()).collect();
        text.push_str(&format!("\n    in {}", names.join(", ")));
        for place in &fault.places {
            text.push_str(&format!(
                "\n    {}: volume {}, {} bytes at {}",
                place.snapshot, place.volume, place.len, place.offset
            ));
        }
    }
    text
}
