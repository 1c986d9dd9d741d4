//! The journal in a real directory, on the I/O pool, with a real process killed.

use std::future::Future;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::pin::Pin;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use bytes::Bytes;
use whimbrel_engine::space::{Extent, UNIT};
use whimbrel_volume::VolumeError;
use whimbrel_volume::journal::{Change, DataSync, Fault, Journal, RecoveryHow, VolumeIdentity};
use whimbrel_volume::pool::{Pool, PoolSize};
use whimbrel_volume::raw::{Access, RawFile};

const UNITS: u64 = 100_000;

const IDENTITY: VolumeIdentity = VolumeIdentity {
    uuid: [5; 16],
    size: UNITS * UNIT,
    epoch: 1,
};

/// A volume that counts its syncs and may be made to fail them.
#[derive(Default)]
struct Data {
    syncs: AtomicU64,
    fails: AtomicBool,
}

impl DataSync for Data {
    fn sync(&self) -> Pin<Box<dyn Future<Output = Result<(), VolumeError>> + Send + '_>> {
        Box::pin(async {
            tokio::task::yield_now().await;
            self.syncs.fetch_add(1, Ordering::SeqCst);
            match self.fails.load(Ordering::SeqCst) {
                true => Err(VolumeError::PoolStopped),
                false => Ok(()),
            }
        })
    }
}

fn pool() -> Pool {
    Pool::start(PoolSize::default()).unwrap()
}

/// Waits for a journal dropped before to end its fold.
async fn open(dir: &Path) -> (Journal, whimbrel_volume::journal::Recovered) {
    let pool = pool();
    loop {
        match Journal::open(&pool, dir, IDENTITY, Arc::new(Data::default())).await {
            Err(VolumeError::JournalBusy { .. }) => tokio::task::yield_now().await,
            opened => return opened.unwrap(),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn many_writers_folds_and_flushes_at_once_lose_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let data = Arc::new(Data::default());
    let journal = Journal::create(&pool(), dir.path(), IDENTITY, data.clone())
        .await
        .unwrap();
    let journal = Arc::new(journal);
    let tasks: Vec<_> = (0..20u64)
        .map(|task| {
            let journal = Arc::clone(&journal);
            tokio::spawn(async move {
                // Every second unit of its own twentieth: 50,000 records in all, several logs full.
                for unit in (task * 5000..(task + 1) * 5000).step_by(2) {
                    journal
                        .record(vec![Change::Written(Extent::unit(unit))])
                        .await
                        .unwrap();
                    if unit % 500 == 0 {
                        journal.barrier().await.unwrap();
                    }
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    assert!(journal.record_lazily(Change::Filled(Extent::unit(1))));
    journal.barrier().await.unwrap();
    drop(journal);

    let (journal, recovered) = open(dir.path()).await;
    assert!(matches!(recovered.how, RecoveryHow::SameBoot { .. }));
    assert_eq!(recovered.resident.len(), 50_001);
    assert_eq!(recovered.guest_owned.len(), 50_000);
    assert!(recovered.resident.contains(1));
    let logs = std::fs::read_dir(dir.path()).unwrap().count();
    assert!(logs <= 8, "old generations are swept: {logs} files");
    journal.close().await.unwrap();
    assert_eq!(open(dir.path()).await.1.how, RecoveryHow::Clean);
}

#[tokio::test]
async fn a_barrier_with_nothing_new_only_syncs_the_data() {
    let dir = tempfile::tempdir().unwrap();
    let data = Arc::new(Data::default());
    let journal = Journal::create(&pool(), dir.path(), IDENTITY, data.clone())
        .await
        .unwrap();
    journal
        .record(vec![Change::Written(Extent::unit(1))])
        .await
        .unwrap();
    journal.barrier().await.unwrap();
    let log = dir.path().join("log-00000001");
    let before = std::fs::read(&log).unwrap();
    journal
        .record(vec![Change::Written(Extent::unit(1))])
        .await
        .unwrap();
    journal.barrier().await.unwrap();
    assert_eq!(data.syncs.load(Ordering::SeqCst), 2);
    assert_eq!(
        std::fs::read(&log).unwrap(),
        before,
        "what is known is not written again"
    );
}

#[tokio::test]
async fn after_a_failed_sync_no_flush_is_promised() {
    let dir = tempfile::tempdir().unwrap();
    let data = Arc::new(Data::default());
    let journal = Journal::create(&pool(), dir.path(), IDENTITY, data.clone())
        .await
        .unwrap();
    journal
        .record(vec![Change::Written(Extent::unit(1))])
        .await
        .unwrap();
    data.fails.store(true, Ordering::SeqCst);
    assert!(journal.barrier().await.is_err());
    data.fails.store(false, Ordering::SeqCst);
    let again = journal.barrier().await;
    assert!(
        matches!(again, Err(VolumeError::JournalPoisoned { .. })),
        "{again:?}"
    );
    let record = journal.record(vec![Change::Written(Extent::unit(2))]).await;
    assert!(matches!(record, Err(VolumeError::JournalPoisoned { .. })));
}

#[tokio::test]
async fn a_complete_volume_retires_its_journal_and_an_incomplete_one_does_not() {
    let dir = tempfile::tempdir().unwrap();
    let data = Arc::new(Data::default());
    let journal = Journal::create(&pool(), dir.path(), IDENTITY, data)
        .await
        .unwrap();
    journal
        .record(vec![Change::Filled(Extent::new(0, UNITS - 1))])
        .await
        .unwrap();
    let partly = |mask| {
        vec![Change::PartlyWritten {
            unit: UNITS - 1,
            mask,
        }]
    };
    journal.record(partly(0x0f)).await.unwrap();
    let early = journal.complete().await;
    assert!(
        matches!(early, Err(VolumeError::JournalIncomplete { absent: 1 })),
        "{early:?}"
    );
    journal.record(partly(0xf0)).await.unwrap();
    journal.complete().await.unwrap();
    journal
        .record(vec![Change::Written(Extent::unit(0))])
        .await
        .unwrap();
    journal.barrier().await.unwrap();
    drop(journal);
    let (journal, recovered) = open(dir.path()).await;
    assert_eq!(recovered.how, RecoveryHow::Complete);
    assert!(recovered.resident.is_full());
    journal.close().await.unwrap();
    Journal::remove(&pool(), dir.path()).await.unwrap();
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[tokio::test]
async fn a_journal_is_not_taken_twice_nor_for_another_volume() {
    let dir = tempfile::tempdir().unwrap();
    let (pool, data) = (pool(), Arc::new(Data::default()));
    let absent = Journal::open(&pool, dir.path(), IDENTITY, data.clone()).await;
    assert!(matches!(
        absent.err(),
        Some(VolumeError::JournalAbsent { .. })
    ));
    let journal = Journal::create(&pool, dir.path(), IDENTITY, data.clone())
        .await
        .unwrap();
    let busy = Journal::open(&pool, dir.path(), IDENTITY, data.clone()).await;
    assert!(matches!(busy.err(), Some(VolumeError::JournalBusy { .. })));
    journal.close().await.unwrap();
    let exists = Journal::create(&pool, dir.path(), IDENTITY, data.clone()).await;
    assert!(matches!(
        exists.err(),
        Some(VolumeError::JournalExists { .. })
    ));
    let later = VolumeIdentity {
        epoch: 2,
        ..IDENTITY
    };
    let foreign = Journal::open(&pool, dir.path(), later, data).await;
    assert!(matches!(
        foreign.err(),
        Some(VolumeError::JournalForeign { .. })
    ));
}

#[tokio::test]
async fn damage_names_the_file_and_the_byte() {
    let dir = tempfile::tempdir().unwrap();
    let data = Arc::new(Data::default());
    let journal = Journal::create(&pool(), dir.path(), IDENTITY, data.clone())
        .await
        .unwrap();
    for unit in 0..3 {
        journal
            .record(vec![Change::Written(Extent::unit(unit * 5))])
            .await
            .unwrap();
    }
    drop(journal);
    let log = dir.path().join("log-00000001");
    let mut bytes = std::fs::read(&log).unwrap();
    bytes[4096 + 32 + 9] ^= 1;
    std::fs::write(&log, bytes).unwrap();
    let error = Journal::open(&pool(), dir.path(), IDENTITY, data)
        .await
        .err()
        .unwrap();
    assert!(matches!(
        error,
        VolumeError::JournalDamaged {
            offset: 4128,
            fault: Fault::Hole,
            ..
        }
    ));
    let text = error.to_string();
    assert!(text.contains("log-00000001 at byte 4128"), "{text}");
}

#[tokio::test]
async fn changes_outside_the_volume_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let data = Arc::new(Data::default());
    let journal = Journal::create(&pool(), dir.path(), IDENTITY, data)
        .await
        .unwrap();
    for change in [
        Change::Filled(Extent::new(UNITS - 1, 2)),
        Change::Written(Extent::new(u64::MAX, 2)),
        Change::Written(Extent::new(3, 0)),
        Change::PartlyWritten { unit: 3, mask: 0 },
    ] {
        let refused = journal.record(vec![change]).await;
        assert!(
            matches!(refused, Err(VolumeError::JournalChange { .. })),
            "{change:?}"
        );
    }
    assert!(!journal.record_lazily(Change::Filled(Extent::new(UNITS, 1))));
    assert!(!journal.record_lazily(Change::Written(Extent::new(0, 1))));
}

/// The daemon of the next test: writes and records units, tells each, until it is killed.
#[test]
fn child_that_writes_until_killed() {
    let Ok(dir) = std::env::var("WHIMBREL_TEST_KILL_DIR") else {
        return;
    };
    let dir = Path::new(&dir);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let pool = pool();
        let file = RawFile::open(&pool, dir.join("disk"), Access::ReadWrite)
            .await
            .unwrap();
        let path = dir.join("journal");
        // The parent's journal may still be closing: a fold under way holds its lock to the end.
        let journal = loop {
            match Journal::open(&pool, &path, IDENTITY, Arc::new(file.clone())).await {
                Ok((journal, _)) => break Arc::new(journal),
                Err(VolumeError::JournalBusy { .. }) => tokio::task::yield_now().await,
                Err(error) => panic!("{error}"),
            }
        };
        let next = Arc::new(AtomicU64::new(0));
        let writers: Vec<_> = (0..8)
            .map(|_| {
                let (file, journal, next) = (file.clone(), journal.clone(), next.clone());
                tokio::spawn(async move {
                    // Far more than it lives to write.
                    while next.load(Ordering::Relaxed) < 1 << 40 {
                        let unit = next.fetch_add(1, Ordering::Relaxed) * 7919 % UNITS;
                        let bytes = Bytes::from(vec![(unit % 251) as u8 + 1; UNIT as usize]);
                        file.write(unit * UNIT, bytes).await.unwrap();
                        journal
                            .record(vec![Change::Written(Extent::unit(unit))])
                            .await
                            .unwrap();
                        println!("acknowledged {unit}");
                    }
                })
            })
            .collect();
        for writer in writers {
            writer.await.unwrap();
        }
    });
}

// Several threads: a fold of a journal that was dropped must be able to end while this test reads from the
// child, which waits for it.
#[tokio::test(flavor = "multi_thread")]
async fn a_killed_daemon_forgets_no_acknowledged_write() {
    let dir = tempfile::tempdir().unwrap();
    let pool = pool();
    let file = RawFile::create(&pool, dir.path().join("disk"), IDENTITY.size)
        .await
        .unwrap();
    let journal_dir = dir.path().join("journal");
    let data = Arc::new(file.clone());
    drop(
        Journal::create(&pool, &journal_dir, IDENTITY, data.clone())
            .await
            .unwrap(),
    );
    let mut acknowledged = std::collections::BTreeSet::new();
    for kill_after in [1, 300, 3000, 25_000] {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child_that_writes_until_killed", "--nocapture"])
            .env("WHIMBREL_TEST_KILL_DIR", dir.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut seen = 0;
        for line in BufReader::new(child.stdout.take().unwrap()).lines() {
            // The last line may be cut; a cut number would be one nobody acknowledged.
            let Some(unit) = line
                .unwrap()
                .strip_prefix("acknowledged ")
                .map(str::to_owned)
            else {
                continue;
            };
            if seen < kill_after {
                acknowledged.insert(unit.parse::<u64>().unwrap());
            }
            seen += 1;
            if seen == kill_after {
                child.kill().unwrap();
            }
        }
        child.wait().unwrap();
        assert!(seen >= kill_after, "the child died by itself");

        let opened = Journal::open(&pool, &journal_dir, IDENTITY, data.clone()).await;
        let (_journal, recovered) = opened.unwrap();
        assert!(matches!(recovered.how, RecoveryHow::SameBoot { .. }));
        for unit in &acknowledged {
            assert!(recovered.resident.contains(*unit), "unit {unit} forgotten");
            assert!(recovered.guest_owned.contains(*unit));
        }
        for unit in recovered.resident.runs().flat_map(|r| r.iter()) {
            let bytes = file.read(unit * UNIT, UNIT as usize).await.unwrap();
            let wanted = (unit % 251) as u8 + 1;
            assert!(
                bytes.iter().all(|&b| b == wanted),
                "unit {unit} claimed, but not there"
            );
        }
    }
}
