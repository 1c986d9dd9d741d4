//! A sparse export in memory, for the tests and the example.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use bytes::{Bytes, BytesMut};
use tokio::sync::Notify;
use whimbrel_nbd::{
    BASE_ALLOCATION, Content, Directory, Errno, Export, ExportInfo, MAX_PIECES, OpenError, Piece,
    STATE_HOLE, STATE_ZERO, StatusRun, ZeroHow,
};

/// Bytes of the grain in which memory is allocated.
pub const PAGE: usize = 32 << 10;

type Page = RwLock<Option<Box<[u8]>>>;

/// Pages that were never written, or were trimmed, are holes and take no memory.
pub struct Memory {
    info: ExportInfo,
    pages: Vec<Page>,
    /// What every request that begins at this offset is answered with.
    fault: fn(u64) -> Option<Errno>,
    /// Reads at this offset wait for a trim there.
    gated: Option<u64>,
    gate: Notify,
}

fn reading(page: &Page) -> RwLockReadGuard<'_, Option<Box<[u8]>>> {
    page.read().unwrap_or_else(PoisonError::into_inner)
}

fn writing(page: &Page) -> RwLockWriteGuard<'_, Option<Box<[u8]>>> {
    page.write().unwrap_or_else(PoisonError::into_inner)
}

impl Memory {
    pub fn new(size: u64) -> Self {
        let mut info = ExportInfo::new(size);
        info.contexts = vec![BASE_ALLOCATION.to_owned()];
        info.description = Some("whimbrel memory".to_owned());
        Memory::with(info)
    }

    pub fn with(info: ExportInfo) -> Self {
        let count = info.size.div_ceil(PAGE as u64);
        let pages = (0..count).map(|_| RwLock::new(None)).collect();
        Memory {
            info,
            pages,
            fault: |_| None,
            gated: None,
            gate: Notify::new(),
        }
    }

    pub fn failing(self, fault: fn(u64) -> Option<Errno>) -> Self {
        Memory { fault, ..self }
    }

    pub fn gated(self, offset: u64) -> Self {
        Memory {
            gated: Some(offset),
            ..self
        }
    }

    fn healthy(&self, offset: u64) -> Result<(), Errno> {
        (self.fault)(offset).map_or(Ok(()), Err)
    }

    /// The range cut at page borders: page, its part of the range, and how much of it came before.
    fn parts(&self, offset: u64, len: u64) -> impl Iterator<Item = (&Page, usize, usize, usize)> {
        let mut at = offset;
        std::iter::from_fn(move || {
            let left = offset + len - at;
            if left == 0 {
                return None;
            }
            let within = (at % PAGE as u64) as usize;
            let part = left.min((PAGE - within) as u64) as usize;
            let before = (at - offset) as usize;
            let page = &self.pages[(at / PAGE as u64) as usize];
            at += part as u64;
            Some((page, within, part, before))
        })
    }

    fn zero(&self, offset: u64, len: u64, keep: bool) {
        for (page, within, part, _) in self.parts(offset, len) {
            let mut page = writing(page);
            if part == PAGE && !keep {
                *page = None;
            } else if keep {
                page.get_or_insert_with(|| vec![0; PAGE].into())[within..within + part].fill(0);
            } else if let Some(bytes) = page.as_mut() {
                bytes[within..within + part].fill(0);
            }
        }
    }
}

impl Export for Memory {
    fn info(&self) -> ExportInfo {
        self.info.clone()
    }

    async fn read(&self, offset: u64, len: u32) -> Result<Bytes, Errno> {
        if self.gated == Some(offset) {
            self.gate.notified().await;
        }
        self.healthy(offset)?;
        let mut data = BytesMut::with_capacity(len as usize);
        for (page, within, part, _) in self.parts(offset, len.into()) {
            match &*reading(page) {
                Some(bytes) => data.extend_from_slice(&bytes[within..within + part]),
                None => data.resize(data.len() + part, 0),
            }
        }
        Ok(data.freeze())
    }

    async fn read_sparse(&self, offset: u64, len: u32) -> Result<Content, Errno> {
        if self.gated == Some(offset) {
            return Ok(Content::Whole(self.read(offset, len).await?));
        }
        self.healthy(offset)?;
        let mut pieces: Vec<Piece> = Vec::new();
        for (page, within, part, _) in self.parts(offset, len.into()) {
            match (&*reading(page), pieces.last_mut()) {
                (Some(bytes), _) => {
                    let data = Bytes::copy_from_slice(&bytes[within..within + part]);
                    pieces.push(Piece::Data(data));
                }
                (None, Some(Piece::Zeroes(before))) => *before += part as u32,
                (None, _) => pieces.push(Piece::Zeroes(part as u32)),
            }
        }
        if pieces.iter().all(|piece| matches!(piece, Piece::Data(_))) || pieces.len() > MAX_PIECES {
            return Ok(Content::Whole(self.read(offset, len).await?));
        }
        Ok(Content::Pieces(pieces))
    }

    async fn write(&self, offset: u64, data: Bytes, _fua: bool) -> Result<(), Errno> {
        self.healthy(offset)?;
        for (page, within, part, before) in self.parts(offset, data.len() as u64) {
            writing(page).get_or_insert_with(|| vec![0; PAGE].into())[within..within + part]
                .copy_from_slice(&data[before..before + part]);
        }
        Ok(())
    }

    async fn flush(&self) -> Result<(), Errno> {
        Ok(())
    }

    async fn trim(&self, offset: u64, len: u64, _fua: bool) -> Result<(), Errno> {
        if self.gated == Some(offset) {
            self.gate.notify_one();
        }
        self.healthy(offset)?;
        self.zero(offset, len, false);
        Ok(())
    }

    async fn write_zeroes(&self, offset: u64, len: u64, how: ZeroHow) -> Result<(), Errno> {
        self.healthy(offset)?;
        if how.fast && how.no_hole {
            return Err(Errno::Enotsup);
        }
        self.zero(offset, len, how.no_hole);
        Ok(())
    }

    async fn cache(&self, offset: u64, _len: u64) -> Result<(), Errno> {
        self.healthy(offset)?;
        Ok(())
    }

    async fn block_status(
        &self,
        context: &str,
        offset: u64,
        len: u64,
        _one: bool,
    ) -> Result<Vec<StatusRun>, Errno> {
        self.healthy(offset)?;
        let runs = self.parts(offset, len).map(|(page, _, part, _)| StatusRun {
            len: part as u64,
            flags: match (context, &*reading(page)) {
                (BASE_ALLOCATION, Some(_)) => 0,
                (BASE_ALLOCATION, None) => STATE_HOLE | STATE_ZERO,
                // Any other: whether it was written.
                (_, content) => content.is_some().into(),
            },
        });
        Ok(runs.collect())
    }
}

/// Exports by name; the empty name is that of the first.
pub struct Shelf<E>(pub BTreeMap<String, Arc<E>>);

impl<E: Export> Shelf<E> {
    pub fn of<const N: usize>(exports: [(&str, E); N]) -> Arc<Self> {
        let exports = exports.map(|(name, export)| (name.to_owned(), Arc::new(export)));
        Arc::new(Shelf(exports.into()))
    }
}

impl<E: Export> Directory for Shelf<E> {
    type Export = E;

    fn list(&self) -> Vec<String> {
        self.0.keys().cloned().collect()
    }

    fn open(&self, name: &str) -> Result<Arc<E>, OpenError> {
        let found = if name.is_empty() {
            self.0.values().next()
        } else {
            self.0.get(name)
        };
        found.cloned().ok_or(OpenError::Unknown)
    }

    fn closed(&self, _name: &str) {}
}
