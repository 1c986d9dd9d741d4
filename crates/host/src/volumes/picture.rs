//! What of a volume is where, summed up in cells.

use std::sync::Arc;

use whimbrel_engine::space::UNIT;
use whimbrel_volume::backend::{Backend, Format};
use whimbrel_volume::heat::{HEAT_EXTENT, WEIGHT};
use whimbrel_volume::raw::Access;

use crate::api::ApiError;
use crate::api::types::{MapCell, MapView};
use crate::daemon::Daemon;
use crate::disk::Filling;
use crate::service::errors::volume_error;
use crate::state::Name;

/// Runs of data looked at for one map; a disk in more pieces than that (256 MiB of memory's worth of asking)
/// is shown as all data from there on.
const RUNS: usize = 4 << 20;

impl Daemon {
    pub(crate) async fn picture(&self, name: Name, cells: usize) -> Result<MapView, ApiError> {
        let record = self.host.state.volume(&name)?;
        let (mut open, mut filling): (Option<Arc<Backend>>, Option<Arc<Filling>>) = (None, None);
        if let Some(machine) = record.machine.as_ref().and_then(|m| self.machines.get(m)) {
            let standing = machine.lock().await;
            let disks = standing.running.iter().flat_map(|r| &r.disks);
            for disk in disks.filter(|d| d.name() == name.as_str()) {
                open = Some(disk.file().clone());
                filling = disk.filling().await;
            }
        }
        let disk = match open {
            Some(open) => open,
            None => {
                let path = record.data_path(&self.host.state.volume_folder(&name));
                // An image that was not closed is put right by whoever opens it to write.
                let access = match record.format {
                    Format::Qcow2 => Access::ReadWrite,
                    Format::Raw | Format::Device => Access::ReadOnly,
                };
                let disk = Backend::open(&self.host.pool, path, record.format, access).await;
                Arc::new(disk.map_err(volume_error)?)
            }
        };
        let mut map = Map::new(record.size, cells);
        map.add_data(&disk).await?;
        if let Some(filling) = filling {
            map.add_residency(&filling).await;
        }
        let heat = self.host.heat.of(&self.host.state, &record);
        let snapshot = heat.access_log().snapshot();
        for (n, (&r, &w)) in (0u64..).zip(snapshot.reads.iter().zip(&snapshot.writes)) {
            if r != 0 || w != 0 {
                let accesses = |heat: u16| u64::from(heat.div_ceil(WEIGHT));
                map.spread(n * HEAT_EXTENT, HEAT_EXTENT, |cell, _| {
                    cell.reads = cell.reads.max(accesses(r));
                    cell.writes = cell.writes.max(accesses(w));
                });
            }
        }
        let mut total = map.cells.iter().fold(MapCell::default(), |sum, c| MapCell {
            data: sum.data + c.data,
            absent: sum.absent + c.absent,
            written: sum.written + c.written,
            ..sum
        });
        for (&r, &w) in snapshot.reads.iter().zip(&snapshot.writes) {
            total.reads += u64::from(r.div_ceil(WEIGHT));
            total.writes += u64::from(w.div_ceil(WEIGHT));
        }
        Ok(MapView {
            volume: name,
            size: record.size,
            cell: map.cell,
            cells: map.cells,
            total,
        })
    }
}

struct Map {
    size: u64,
    cell: u64,
    cells: Vec<MapCell>,
}

impl Map {
    /// Cells of whole units, at most so many.
    fn new(size: u64, cells: usize) -> Map {
        let cell = size.div_ceil(cells as u64).next_multiple_of(UNIT);
        Map {
            size,
            cell,
            cells: vec![MapCell::default(); size.div_ceil(cell) as usize],
        }
    }

    /// Does something to each cell of the range, told how many bytes of the range are the cell's.
    fn spread(&mut self, offset: u64, len: u64, mut f: impl FnMut(&mut MapCell, u64)) {
        let end = (offset + len).min(self.size);
        let mut at = offset;
        while at < end {
            let next = ((at / self.cell + 1) * self.cell).min(end);
            f(&mut self.cells[(at / self.cell) as usize], next - at);
            at = next;
        }
    }

    async fn add_data(&mut self, disk: &Backend) -> Result<(), ApiError> {
        let (mut at, mut runs) = (0, 0);
        while at < self.size {
            let left = self.size - at;
            if runs > RUNS {
                self.spread(at, left, |cell, len| cell.data += len);
                break;
            }
            let found = disk.data_extents(at, left).await.map_err(volume_error)?;
            runs += found.len();
            for run in found {
                at = run.offset + run.len;
                if run.data {
                    self.spread(run.offset, run.len, |cell, len| cell.data += len);
                }
            }
        }
        Ok(())
    }

    async fn add_residency(&mut self, filling: &Filling) {
        let units = filling.units();
        let mut at = 0;
        let mut asked = 0u32;
        while at < units {
            let (resident, written, run) = filling.residency_run(at, units);
            let (offset, len) = (at * UNIT, run * UNIT);
            if !resident {
                self.spread(offset, len, |cell, len| cell.absent += len);
            }
            if written {
                self.spread(offset, len, |cell, len| cell.written += len);
            }
            at += run.max(1);
            asked += 1;
            if asked.is_multiple_of(1024) {
                // The guest's own requests take the same lock.
                tokio::task::yield_now().await;
            }
        }
        for cell in &mut self.cells {
            // A file of a disk that arrives has no holes that count: what is absent is nothing yet.
            cell.data = cell.data.min(self.cell - cell.absent.min(self.cell));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_spread_over_its_cells_and_no_further() {
        let mut map = Map::new(10 * UNIT + 512, 4);
        assert_eq!((map.cell, map.cells.len()), (3 * UNIT, 4));
        map.spread(2 * UNIT, 100 * UNIT, |cell, len| cell.data += len);
        let data: Vec<u64> = map.cells.iter().map(|c| c.data).collect();
        assert_eq!(data, [UNIT, 3 * UNIT, 3 * UNIT, UNIT + 512]);
    }
}
