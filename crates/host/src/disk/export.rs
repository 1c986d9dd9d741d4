//! The NBD face of a machine's disks.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use whimbrel_engine::space::UNIT;
use whimbrel_nbd::{
    BASE_ALLOCATION, Directory, Errno, Export, ExportInfo, OpenError, STATE_HOLE, STATE_ZERO,
    StatusRun, ZeroHow,
};
use whimbrel_volume::VolumeError;
use whimbrel_volume::raw::Zeroes;
use whimbrel_volume::trace::Kind;

use super::{Disk, Mode};

/// Our own metadata context: bit 0 resident, bit 1 written by the guest since it came here.
pub const RESIDENCY: &str = "whimbrel:residency";
const RESIDENT: u32 = 1;
const WRITTEN: u32 = 2;

/// Most runs of one status reply.
const MAX_RUNS: usize = 4096;

/// The disks of one machine, by the name of their volume: what is served on the machine's own socket, so
/// that a machine can reach no other machine's disks.
pub struct MachineDisks {
    disks: BTreeMap<String, Arc<Disk>>,
}

impl MachineDisks {
    pub fn new(disks: impl IntoIterator<Item = Arc<Disk>>) -> Self {
        MachineDisks {
            disks: disks
                .into_iter()
                .map(|d| (d.name().to_string(), d))
                .collect(),
        }
    }

    pub fn disks(&self) -> impl Iterator<Item = &Arc<Disk>> {
        self.disks.values()
    }
}

impl Directory for MachineDisks {
    type Export = Disk;

    fn list(&self) -> Vec<String> {
        self.disks.keys().cloned().collect()
    }

    fn open(&self, name: &str) -> Result<Arc<Disk>, OpenError> {
        self.disks.get(name).cloned().ok_or(OpenError::Unknown)
    }

    fn closed(&self, _name: &str) {}

    fn thread_started(&self) {
        whimbrel_volume::lent::lend_this_thread();
    }
}

/// What a guest is told of a volume's failure.
pub fn errno(error: &VolumeError) -> Errno {
    tracing::error!(%error, "guest I/O failed");
    if error.is_no_space() {
        Errno::Enospc
    } else {
        Errno::Eio
    }
}

/// How the backend is to zero what a client wants zeroed so.
pub fn zeroes_of(how: ZeroHow) -> Zeroes {
    Zeroes {
        no_hole: how.no_hole,
        fast_only: how.fast,
    }
}

impl Export for Disk {
    fn info(&self) -> ExportInfo {
        let mut info = ExportInfo::new(self.size());
        info.read_only = self.read_only;
        info.contexts = vec![BASE_ALLOCATION.to_string(), RESIDENCY.to_string()];
        info.description = Some(format!("whimbrel volume {}", self.name()));
        info
    }

    async fn read(&self, offset: u64, len: u32) -> Result<Bytes, Errno> {
        self.log(Kind::Read, offset, u64::from(len));
        let mode = self.mode.read().await.clone();
        match mode {
            Mode::Open | Mode::Noted(_) | Mode::Frozen => self
                .file()
                .read(offset, len as usize)
                .await
                .map_err(|e| errno(&e)),
            Mode::Arriving(source) => source.peek(offset, len).await.ok_or(Errno::Eio),
            Mode::Filling(filling) => filling.read(offset, len).await,
        }
    }

    async fn write(&self, offset: u64, data: Bytes, fua: bool) -> Result<(), Errno> {
        self.log(Kind::Write, offset, data.len() as u64);
        self.log_fua(fua);
        let mode = self.mode.read().await;
        let _noted = mode.change(offset, data.len() as u64);
        match &*mode {
            Mode::Open | Mode::Noted(_) => {
                self.touched.store(true, Ordering::Release);
                self.before_change(offset, data.len() as u64).await;
                self.file()
                    .write(offset, data)
                    .await
                    .map_err(|e| errno(&e))?;
                self.sync_if(fua).await
            }
            Mode::Filling(filling) => {
                self.touched.store(true, Ordering::Release);
                self.before_change(offset, data.len() as u64).await;
                filling.write(offset, data, fua).await
            }
            Mode::Frozen | Mode::Arriving(_) => Err(self.fenced()),
        }
    }

    async fn flush(&self) -> Result<(), Errno> {
        self.log(Kind::Flush, 0, 0);
        let mode = self.mode.read().await.clone();
        match mode {
            Mode::Open | Mode::Noted(_) | Mode::Frozen => self.sync_if(true).await,
            // Nothing was written here, so nothing is owed.
            Mode::Arriving(_) => Ok(()),
            Mode::Filling(filling) => filling.flush().await,
        }
    }

    async fn trim(&self, offset: u64, len: u64, fua: bool) -> Result<(), Errno> {
        self.log(Kind::Trim, offset, len);
        self.log_fua(fua);
        let mode = self.mode.read().await;
        let _noted = mode.change(offset, len);
        match &*mode {
            Mode::Open | Mode::Noted(_) => {
                self.touched.store(true, Ordering::Release);
                // A discard is a hint, and not worth putting gigabytes aside for.
                if self.shot_now().is_some_and(|shot| shot.wants(offset, len)) {
                    return self.sync_if(fua).await;
                }
                self.before_change(offset, len).await;
                self.file()
                    .discard(offset, len)
                    .await
                    .map_err(|e| errno(&e))?;
                self.sync_if(fua).await
            }
            Mode::Filling(filling) => {
                self.touched.store(true, Ordering::Release);
                self.before_change(offset, len).await;
                filling.trim(offset, len, fua).await
            }
            Mode::Frozen | Mode::Arriving(_) => Err(self.fenced()),
        }
    }

    async fn write_zeroes(&self, offset: u64, len: u64, how: ZeroHow) -> Result<(), Errno> {
        self.log(Kind::Zero, offset, len);
        self.log_fua(how.fua);
        let mode = self.mode.read().await;
        let _noted = mode.change(offset, len);
        match &*mode {
            Mode::Open | Mode::Noted(_) => {
                self.touched.store(true, Ordering::Release);
                self.before_change(offset, len).await;
                self.file()
                    .write_zeroes(offset, len, zeroes_of(how))
                    .await
                    .map_err(|e| errno(&e))?;
                self.sync_if(how.fua).await
            }
            Mode::Filling(filling) => {
                self.touched.store(true, Ordering::Release);
                self.before_change(offset, len).await;
                filling.zero(offset, len, how).await
            }
            Mode::Frozen | Mode::Arriving(_) => Err(self.fenced()),
        }
    }

    async fn cache(&self, offset: u64, len: u64) -> Result<(), Errno> {
        let mode = self.mode.read().await.clone();
        match mode {
            Mode::Open | Mode::Noted(_) | Mode::Frozen => {
                // A hint: what cannot be read ahead now is read when it is asked for.
                let _ = self.file().prefetch(offset, len).await;
            }
            Mode::Arriving(_) => {}
            Mode::Filling(filling) => filling.prefetch(offset, len),
        }
        Ok(())
    }

    async fn block_status(
        &self,
        context: &str,
        offset: u64,
        len: u64,
        one: bool,
    ) -> Result<Vec<StatusRun>, Errno> {
        let mode = self.mode.read().await.clone();
        let max = if one { 1 } else { MAX_RUNS };
        if context == RESIDENCY {
            return Ok(self.residency(&mode, offset, len, max));
        }
        match mode {
            Mode::Arriving(_) => Ok(vec![StatusRun { len, flags: 0 }]),
            Mode::Open | Mode::Noted(_) | Mode::Frozen => self.allocation(offset, len, max).await,
            Mode::Filling(filling) => {
                // Absent content is data to a client: whether it is zero only the source knows yet.
                let (resident, _, units) =
                    filling.residency_run(offset / UNIT, (offset + len).div_ceil(UNIT));
                let run = ((offset / UNIT + units) * UNIT).min(offset + len) - offset;
                if resident {
                    self.allocation(offset, run, max).await
                } else {
                    Ok(vec![StatusRun { len: run, flags: 0 }])
                }
            }
        }
    }
}

impl Disk {
    /// One that is to be durable when it is answered has its flush in itself.
    fn log_fua(&self, fua: bool) {
        if fua {
            self.log(Kind::Flush, 0, 0);
        }
    }

    async fn sync_if(&self, fua: bool) -> Result<(), Errno> {
        if fua {
            self.file().sync().await.map_err(|e| errno(&e))?;
        }
        Ok(())
    }

    fn fenced(&self) -> Errno {
        tracing::warn!(
            volume = self.name(),
            "a write was refused: this host does not own the machine now"
        );
        Errno::Eperm
    }

    async fn allocation(&self, offset: u64, len: u64, max: usize) -> Result<Vec<StatusRun>, Errno> {
        let runs = self
            .file()
            .data_extents(offset, len)
            .await
            .map_err(|e| errno(&e))?;
        Ok(runs
            .into_iter()
            .take(max)
            .map(|run| StatusRun {
                len: run.len,
                flags: if run.data { 0 } else { STATE_HOLE | STATE_ZERO },
            })
            .collect())
    }

    fn residency(&self, mode: &Mode, offset: u64, len: u64, max: usize) -> Vec<StatusRun> {
        match mode {
            Mode::Open | Mode::Noted(_) | Mode::Frozen => vec![StatusRun {
                len,
                flags: RESIDENT,
            }],
            Mode::Arriving(_) => vec![StatusRun { len, flags: 0 }],
            Mode::Filling(filling) => {
                let end = offset + len;
                let mut runs = Vec::new();
                let mut at = offset;
                while at < end && runs.len() < max {
                    let (resident, written, units) =
                        filling.residency_run(at / UNIT, end.div_ceil(UNIT));
                    let next = ((at / UNIT + units) * UNIT).min(end);
                    runs.push(StatusRun {
                        len: next - at,
                        flags: if resident { RESIDENT } else { 0 }
                            | if written { WRITTEN } else { 0 },
                    });
                    at = next;
                }
                runs
            }
        }
    }
}
