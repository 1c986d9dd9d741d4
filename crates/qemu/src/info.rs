//! What a running QEMU is made of.

use std::collections::BTreeSet;
use std::path::PathBuf;

use serde_json::{Value, json};
use whimbrel_engine::set::UnitSet;
use whimbrel_engine::space::Extent;

use crate::qmp::Qmp;
use crate::stream::StreamLayout;
use crate::{Error, Result};

/// A block node that is an NBD client over a unix socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NbdNode {
    pub node: String,
    pub socket: PathBuf,
    pub export: String,
}

/// What a running QEMU says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Info {
    /// Concrete machine type (`pc-q35-10.0`).
    pub machine_type: String,
    pub memory_bytes: u64,
    /// `running`, `paused`, `postmigrate`, ...
    pub status: String,
    pub pid: Option<i32>,
    pub nbd: Vec<NbdNode>,
}

/// Asks a running QEMU.
pub async fn info(qmp: &Qmp) -> Result<Info> {
    let machine_type = qmp
        .execute("qom-get", json!({"path": "/machine", "property": "type"}))
        .await?;
    let machine_type = machine_type.as_str().ok_or(Error::Answer {
        command: "qom-get",
        what: "the machine's type is no string",
    })?;
    let memory = qmp.execute("query-memory-size-summary", json!({})).await?;
    let base = memory["base-memory"].as_u64().ok_or(Error::Answer {
        command: "query-memory-size-summary",
        what: "no base memory",
    })?;
    let nodes = qmp
        .execute("query-named-block-nodes", json!({"flat": true}))
        .await?;
    Ok(Info {
        machine_type: machine_type
            .strip_suffix("-machine")
            .unwrap_or(machine_type)
            .to_owned(),
        memory_bytes: base + memory["plugged-memory"].as_u64().unwrap_or(0),
        status: crate::source::run_status(qmp).await?,
        pid: qmp.pid(),
        nbd: nodes
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(nbd_node)
            .collect(),
    })
}

/// `nbd+unix:///EXPORT?socket=PATH` (`nbd+unix://?socket=PATH` for the unnamed export).
fn nbd_node(node: &Value) -> Option<NbdNode> {
    if node["drv"] != "nbd" {
        return None;
    }
    let (export, socket) = node["file"]
        .as_str()?
        .strip_prefix("nbd+unix://")?
        .split_once("?socket=")?;
    Some(NbdNode {
        node: node["node-name"].as_str()?.to_owned(),
        socket: socket.into(),
        export: export.strip_prefix('/').unwrap_or(export).to_owned(),
    })
}

/// A run of guest-physical addresses and where in which RAM block it lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping {
    pub start: u64,
    /// The first address after the run.
    pub end: u64,
    /// Name of the memory region: the RAM block's name, for memory without a backend of its own.
    pub region: String,
    pub offset: u64,
}

/// The guest-physical address space's RAM: around the hole below 4 GiB, where this machine type puts it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PhysicalMap {
    mappings: Vec<Mapping>,
}

impl PhysicalMap {
    /// Asks QEMU, whose answer holds for every machine type and size.
    pub async fn query(qmp: &Qmp) -> Result<PhysicalMap> {
        Ok(PhysicalMap::parse(&qmp.human("info mtree -f").await?))
    }

    /// The RAM lines of the flat view that is the system's memory:
    /// `  0000000100000000-00000001bfffffff (prio 0, ram): pc.ram @0000000080000000`.
    fn parse(text: &str) -> PhysicalMap {
        let mut views = text.split("FlatView #");
        let view = views
            .find(|view| view.contains("\n AS \"memory\","))
            .unwrap_or("");
        PhysicalMap {
            mappings: view.lines().filter_map(mapping).collect(),
        }
    }

    /// The region and the offset in it that stand at a guest-physical address, if RAM is there.
    pub fn find(&self, address: u64) -> Option<(&str, u64)> {
        self.mappings
            .iter()
            .find(|m| (m.start..m.end).contains(&address))
            .map(|m| (m.region.as_str(), m.offset + (address - m.start)))
    }
}

fn mapping(line: &str) -> Option<Mapping> {
    let (range, rest) = line.trim().split_once(" (prio ")?;
    let (start, end) = range.split_once('-')?;
    let (kind, name) = rest.split_once("): ")?;
    if !kind.ends_with(", ram") {
        return None;
    }
    let (region, offset) = match name.split_once(" @") {
        Some((region, offset)) => {
            let digits = offset.split_whitespace().next()?;
            (region, u64::from_str_radix(digits, 16).ok()?)
        }
        None => (name, 0),
    };
    Some(Mapping {
        start: u64::from_str_radix(start, 16).ok()?,
        end: u64::from_str_radix(end, 16).ok()?.checked_add(1)?,
        // Under KVM a word about the kernel's slots follows the name.
        region: region.split(" KVM").next()?.trim().to_owned(),
        offset,
    })
}

/// Per block of the layout: the pages of virtqueue rings, which a destination QEMU touches while it
/// loads its devices. They should travel with the grant: each one missing there is a round trip in the
/// blackout, one after the other. Empty where QEMU cannot tell (before 7.2).
pub async fn ring_pages(qmp: &Qmp, layout: &StreamLayout) -> Result<Vec<UnitSet>> {
    let mut sets: Vec<UnitSet> = layout
        .blocks
        .iter()
        .map(|b| UnitSet::empty(b.units()))
        .collect();
    let devices = match qmp.execute("x-query-virtio", json!({})).await {
        Ok(devices) => devices,
        Err(Error::Qmp { .. }) => return Ok(sets),
        Err(other) => return Err(other),
    };
    let map = PhysicalMap::query(qmp).await?;
    let mut addresses = BTreeSet::new();
    for device in devices.as_array().into_iter().flatten() {
        let Some(path) = device["path"].as_str() else {
            continue;
        };
        queues_of(qmp, path, &mut addresses).await?;
    }
    for (address, len) in addresses {
        let mut at = address;
        let end = address.saturating_add(len);
        while at < end {
            if let Some((region, offset)) = map.find(at)
                && let Some(block) = block_of_region(layout, region)
            {
                sets[block].insert(Extent::touching(offset, 1));
            }
            at = (at / 4096 + 1) * 4096;
        }
    }
    Ok(sets)
}

/// Per block of the layout: the pages a destination QEMU is known to touch before the guest runs, in
/// the order of loading: the option ROMs' shadow (the APIC helper QEMU puts there is inspected when its
/// state is loaded), then the [`ring_pages`]. Ask before the stop: it takes several QMP commands.
///
/// The shadow is 128 KiB, nearly all of it zero in most guests: only its non-zero pages need to travel.
pub async fn early_pages(qmp: &Qmp, layout: &StreamLayout) -> Result<Vec<UnitSet>> {
    let mut sets = ring_pages(qmp, layout).await?;
    let map = PhysicalMap::query(qmp).await?;
    // Behind the ROMs, where they are shadowed, lies the block that begins at address 0.
    if let Some((region, 0)) = map.find(0)
        && let Some(main) = block_of_region(layout, region)
    {
        sets[main].insert(Extent::touching(OPTION_ROMS.0, OPTION_ROMS.1));
    }
    Ok(sets)
}

/// Guest-physical start and length of the area where a PC's firmware puts option ROMs.
const OPTION_ROMS: (u64, u64) = (0xc_0000, 0x2_0000);

/// A block is named as its region, or, for a memory backend, by the object's path.
fn block_of_region(layout: &StreamLayout, region: &str) -> Option<usize> {
    layout.block(region).or_else(|| {
        let object = format!("/objects/{region}");
        layout.block(&object)
    })
}

/// Adds (address, length) of each part of each ring of a device that the guest has set up.
async fn queues_of(qmp: &Qmp, path: &str, out: &mut BTreeSet<(u64, u64)>) -> Result<()> {
    let status = match qmp
        .execute("x-query-virtio-status", json!({ "path": path }))
        .await
    {
        Ok(status) => status,
        Err(Error::Qmp { .. }) => return Ok(()),
        Err(other) => return Err(other),
    };
    for queue in 0..status["num-vqs"].as_u64().unwrap_or(0) {
        let arguments = json!({ "path": path, "queue": queue });
        let ring = match qmp.execute("x-query-virtio-queue-status", arguments).await {
            Ok(ring) => ring,
            // A queue that the guest does not use.
            Err(Error::Qmp { .. }) => continue,
            Err(other) => return Err(other),
        };
        let field = |name: &str| ring[name].as_u64().unwrap_or(0);
        let entries = field("vring-num");
        if field("vring-desc") == 0 || entries == 0 {
            continue;
        }
        // Sizes by the VIRTIO specification, split rings, event indices included.
        out.insert((field("vring-desc"), 16 * entries));
        out.insert((field("vring-avail"), 6 + 2 * entries));
        out.insert((field("vring-used"), 6 + 8 * entries));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const MTREE: &str = r#"FlatView #0
 AS "I/O", root: io
 Root memory region: io
  0000000000000000-0000000000000007 (prio 0, i/o): dma-chan

FlatView #1
 AS "memory", root: system
 AS "cpu-memory-0", root: system
 Root memory region: system
  0000000000000000-00000000000bffff (prio 0, ram): pc.ram KVM
  00000000000c0000-00000000000dffff (prio 1, rom): pc.rom
  0000000000100000-00000000bfffffff (prio 0, ram): pc.ram @0000000000100000 KVM
  00000000fec00000-00000000fec00fff (prio 0, i/o): ioapic
  0000000100000000-000000013fffffff (prio 0, ram): pc.ram @00000000c0000000
"#;

    #[test]
    fn memory_above_the_hole_follows_memory_below_it() {
        let map = PhysicalMap::parse(MTREE);
        assert_eq!(map.find(0x1000), Some(("pc.ram", 0x1000)));
        assert_eq!(map.find(0xbfff_f000), Some(("pc.ram", 0xbfff_f000)));
        assert_eq!(map.find(0x1_0000_2000), Some(("pc.ram", 0xc000_2000)));
    }

    #[test]
    fn rom_and_devices_are_not_ram() {
        let map = PhysicalMap::parse(MTREE);
        assert_eq!(map.find(0xc_8000), None);
        assert_eq!(map.find(0xfec0_0000), None);
        assert_eq!(map.find(0x1_4000_0000), None);
    }

    #[test]
    fn an_nbd_node_names_its_export() {
        let node = |file: &str| json!({"drv": "nbd", "node-name": "d", "file": file});
        let found = nbd_node(&node("nbd+unix:///vm 1/root?socket=/run/a,b")).expect("NBD");
        assert_eq!(found.export, "vm 1/root");
        assert_eq!(found.socket, PathBuf::from("/run/a,b"));
        let unnamed = nbd_node(&node("nbd+unix://?socket=/run/a")).expect("NBD");
        assert_eq!(unnamed.export, "");
        assert_eq!(nbd_node(&node("nbd://host/x")), None);
    }
}
