//! Raw volumes on a real file system.

use super::*;
use crate::pool::PoolSize;
use proptest::prelude::*;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

const MIB: u64 = 1 << 20;

async fn fresh(size: u64) -> (tempfile::TempDir, RawFile) {
    let dir = tempfile::tempdir().unwrap();
    let pool = Pool::start(PoolSize::default()).unwrap();
    let file = RawFile::create(&pool, dir.path().join("disk"), size)
        .await
        .unwrap();
    (dir, file)
}

#[tokio::test]
async fn what_is_written_is_read_back_and_found_as_data() {
    let (_dir, file) = fresh(10 * MIB + 512).await;
    file.write(3 * MIB, Bytes::from(vec![7; MIB as usize]))
        .await
        .unwrap();
    file.sync().await.unwrap();
    assert_eq!(file.read(3 * MIB - 1, 3).await.unwrap()[..], [0, 7, 7]);
    assert_eq!(
        file.read(3 * MIB, MIB as usize).await.unwrap(),
        vec![7; MIB as usize]
    );
    assert_eq!(file.read(10 * MIB, 512).await.unwrap(), vec![0; 512]);
    assert_eq!(
        file.data_extents(0, file.size()).await.unwrap(),
        [
            DataExtent {
                offset: 0,
                len: 3 * MIB,
                data: false
            },
            DataExtent {
                offset: 3 * MIB,
                len: MIB,
                data: true
            },
            DataExtent {
                offset: 4 * MIB,
                len: 6 * MIB + 512,
                data: false
            },
        ]
    );
    assert_eq!(file.allocated().await.unwrap(), MIB);
    file.prefetch(0, file.size()).await.unwrap();
}

#[tokio::test]
async fn a_discard_gives_room_back_and_no_hole_keeps_it() {
    let (_dir, file) = fresh(4 * MIB).await;
    file.write(0, Bytes::from(vec![7; 4 * MIB as usize]))
        .await
        .unwrap();
    file.discard(MIB, MIB).await.unwrap();
    assert_eq!(file.allocated().await.unwrap(), 3 * MIB);
    let keep = Zeroes {
        no_hole: true,
        fast_only: false,
    };
    file.write_zeroes(2 * MIB, MIB, keep).await.unwrap();
    assert_eq!(file.allocated().await.unwrap(), 3 * MIB);
    assert_eq!(
        file.read(MIB, 2 * MIB as usize).await.unwrap(),
        vec![0; 2 * MIB as usize]
    );
    assert_eq!(file.size(), 4 * MIB);
}

#[tokio::test]
async fn where_nothing_can_be_punched_zeroes_are_written() {
    let (_dir, file) = fresh(4 * MIB).await;
    file.write(0, Bytes::from(vec![7; 4 * MIB as usize]))
        .await
        .unwrap();
    file.inner.punch.store(false, Ordering::Relaxed);
    file.inner.zero_range.store(false, Ordering::Relaxed);
    let fast = Zeroes {
        no_hole: false,
        fast_only: true,
    };
    let refused = file.write_zeroes(0, MIB, fast).await;
    assert!(matches!(refused, Err(VolumeError::NotFast { .. })));
    file.discard(100, 3 * MIB).await.unwrap();
    let bytes = file.read(0, 4 * MIB as usize).await.unwrap();
    assert!(bytes[..100].iter().all(|&b| b == 7));
    assert!(bytes[100..100 + 3 * MIB as usize].iter().all(|&b| b == 0));
    assert!(bytes[100 + 3 * MIB as usize..].iter().all(|&b| b == 7));
}

#[tokio::test]
async fn requests_past_the_end_are_refused() {
    let (_dir, file) = fresh(8192).await;
    for (offset, len) in [(8192, 1), (8191, 2), (u64::MAX, 1)] {
        let read = file.read(offset, len).await;
        assert!(
            matches!(read, Err(VolumeError::OutOfRange { size: 8192, .. })),
            "{offset}"
        );
    }
    assert!(file.write(8000, Bytes::from(vec![0; 193])).await.is_err());
    assert_eq!(file.read(8192, 0).await.unwrap().len(), 0);
}

#[tokio::test]
async fn errors_say_where_and_a_full_device_is_told_apart() {
    let pool = Pool::start(PoolSize::default()).unwrap();
    let absent = RawFile::open(&pool, "/nonexistent/disk", Access::ReadOnly).await;
    let text = absent.err().unwrap().to_string();
    assert!(text.starts_with("cannot open /nonexistent/disk"), "{text}");

    let full = Inner::new(
        OpenOptions::new().write(true).open("/dev/full").unwrap(),
        "/dev/full".into(),
        MIB,
    );
    let file = RawFile::of(&pool, full);
    let error = file
        .write(4096, Bytes::from_static(b"x"))
        .await
        .unwrap_err();
    assert!(error.is_no_space());
    assert!(error.to_string().contains("1 bytes at 4096"), "{error}");
}

#[tokio::test]
async fn a_file_cut_short_behind_our_back_is_an_error_not_zeroes() {
    let (dir, file) = fresh(MIB).await;
    let other = OpenOptions::new()
        .write(true)
        .open(dir.path().join("disk"))
        .unwrap();
    other.set_len(4096).unwrap();
    assert!(file.read(0, 8192).await.is_err());
    assert_eq!(file.read(0, 4096).await.unwrap().len(), 4096);
}

#[tokio::test]
async fn after_one_failed_sync_none_succeeds() {
    let (_dir, file) = fresh(MIB).await;
    *file.inner.sync_failed.lock().unwrap() = Some(Arc::new(io::Error::other("gone")));
    assert!(matches!(
        file.sync().await,
        Err(VolumeError::SyncLost { .. })
    ));
    assert!(matches!(
        file.sync().await,
        Err(VolumeError::SyncLost { .. })
    ));
}

#[derive(Clone, Debug)]
enum Op {
    Write(u64, usize, u8),
    Zero(u64, u64, bool),
    Discard(u64, u64),
}

fn op() -> impl Strategy<Value = Op> {
    let range = (0u64..300_000, 1u64..100_000);
    prop_oneof![
        (range.clone(), 1u8..).prop_map(|((o, l), b)| Op::Write(o, l as usize, b)),
        (range.clone(), any::<bool>()).prop_map(|((o, l), n)| Op::Zero(o, l, n)),
        range.prop_map(|(o, l)| Op::Discard(o, l)),
    ]
}

/// How a volume is opened, and from where it is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Buffered,
    Direct,
    /// On a thread of its own.
    LentBuffered,
    LentDirect,
}

impl Way {
    const ALL: [Way; 4] = [
        Way::Buffered,
        Way::Direct,
        Way::LentBuffered,
        Way::LentDirect,
    ];

    /// Runs a test's future to its end, where this way wants it.
    fn run<F: Future<Output = ()>>(self, test: impl FnOnce() -> F + Send) {
        let lent = matches!(self, Way::LentBuffered | Way::LentDirect);
        std::thread::scope(|scope| {
            let thread = scope.spawn(move || {
                let mut runtime = tokio::runtime::Builder::new_current_thread();
                if lent {
                    lent::lend_this_thread();
                } else {
                    runtime = tokio::runtime::Builder::new_multi_thread();
                }
                runtime.enable_all().build().unwrap().block_on(test());
            });
            // The scope's own end does not wait for the thread's locals, the ring, to be dropped.
            thread
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        });
    }

    async fn fresh(self, size: u64) -> (tempfile::TempDir, RawFile) {
        let (dir, file) = fresh(size).await;
        if matches!(self, Way::Buffered | Way::LentBuffered) {
            return (dir, file);
        }
        let file = RawFile::open_direct(file.pool(), file.path(), Access::ReadWrite)
            .await
            .unwrap();
        (dir, file)
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]
    #[test]
    fn a_volume_is_an_array_of_bytes(
        way in proptest::sample::select(&Way::ALL),
        ops in proptest::collection::vec(op(), 1..12),
    ) {
        way.run(async move || array_of_bytes(way, ops).await);
    }
}

async fn array_of_bytes(way: Way, ops: Vec<Op>) {
    let direct = matches!(way, Way::Direct | Way::LentDirect);
    let size = if direct { 401_408 } else { 400_001 };
    let (_dir, file) = way.fresh(size).await;
    let mut model = vec![0u8; size as usize];
    for op in ops {
        match op {
            Op::Write(o, l, b) => {
                file.write(o, Bytes::from(vec![b; l])).await.unwrap();
                model[o as usize..o as usize + l].fill(b);
            }
            Op::Zero(o, l, no_hole) => {
                let how = Zeroes {
                    no_hole,
                    fast_only: false,
                };
                file.write_zeroes(o, l, how).await.unwrap();
                model[o as usize..(o + l) as usize].fill(0);
            }
            Op::Discard(o, l) => {
                file.discard(o, l).await.unwrap();
                model[o as usize..(o + l) as usize].fill(0);
            }
        }
    }
    assert_eq!(file.read(0, size as usize).await.unwrap(), model);
    assert_eq!(file.read(777, 5000).await.unwrap(), model[777..5777]);
    let runs = file.data_extents(1000, size - 1000).await.unwrap();
    let mut at = 1000;
    for run in &runs {
        assert_eq!(run.offset, at);
        at += run.len;
        if !run.data {
            let hole = &model[run.offset as usize..at as usize];
            assert!(hole.iter().all(|&b| b == 0));
        }
    }
    assert_eq!(at, size);
    file.sync().await.unwrap();
    // What others see is the same, whatever way it went.
    assert_eq!(std::fs::read(file.path()).unwrap(), model);
}

#[test]
fn parts_of_one_block_written_at_the_same_time_all_arrive() {
    for way in Way::ALL {
        way.run(async move || {
            let (_dir, file) = way.fresh(MIB).await;
            for round in 1..20u8 {
                let mut writes = Vec::new();
                for part in 0..40u64 {
                    let (file, bytes) = (file.clone(), Bytes::from(vec![round; 100]));
                    let write = async move { file.write(96 + part * 100, bytes).await };
                    writes.push(tokio::spawn(write));
                }
                let (whole, bytes) = (file.clone(), Bytes::from(vec![round; 4096]));
                writes.push(tokio::spawn(async move { whole.write(4096, bytes).await }));
                for write in writes {
                    write.await.unwrap().unwrap();
                }
                let bytes = file.read(96, 8192 - 96).await.unwrap();
                assert!(bytes.iter().all(|&b| b == round), "{way:?} {round}");
            }
        });
    }
}

#[test]
fn more_requests_than_a_ring_holds_are_all_done() {
    for way in [Way::Direct, Way::LentDirect] {
        way.run(async move || {
            let (_dir, file) = way.fresh(4 * MIB).await;
            let writes: Vec<_> = (0..1000u64)
                .map(|n| {
                    let (file, bytes) = (file.clone(), Bytes::from(vec![n as u8; 4096]));
                    tokio::spawn(async move { file.write(n * 4096, bytes).await })
                })
                .collect();
            for write in writes {
                write.await.unwrap().unwrap();
            }
            let reads: Vec<_> = (0..1000u64)
                .map(|n| {
                    let file = file.clone();
                    tokio::spawn(async move { (n, file.read(n * 4096, 4096).await.unwrap()) })
                })
                .collect();
            for read in reads {
                let (n, bytes) = read.await.unwrap();
                assert!(bytes.iter().all(|&b| b == n as u8), "{n}");
            }
        });
    }
}

#[test]
fn a_thread_that_ends_with_requests_under_way_waits_for_them() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    let made = path.clone();
    let by_the_ring = AtomicBool::new(false);
    Way::LentDirect.run(async || {
        let pool = Pool::start(PoolSize::default()).unwrap();
        RawFile::create(&pool, &made, MIB).await.unwrap();
        let file = RawFile::open_direct(&pool, &made, Access::ReadWrite)
            .await
            .unwrap();
        for n in 0..100u64 {
            let bytes = Bytes::from(vec![7; 4096]);
            let mut write = Box::pin(file.write(n * 4096, bytes));
            // Begun, and left.
            assert!(poll_once(write.as_mut()).is_pending());
        }
        tokio::task::yield_now().await;
        by_the_ring.store(crate::ring::is_running(), Relaxed);
    });
    if !by_the_ring.load(Relaxed) {
        eprintln!("skipped: this system has no io_uring, or refuses it");
        return;
    }
    let written = std::fs::read(path).unwrap();
    assert!(written[..409_600].iter().all(|&byte| byte == 7));
}

fn poll_once<F: Future>(future: Pin<&mut F>) -> std::task::Poll<F::Output> {
    let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
    future.poll(&mut cx)
}

#[tokio::test]
async fn what_has_no_direct_io_is_served_through_the_page_cache() {
    let (_dir, file) = fresh(4096 + 100).await;
    let odd = RawFile::open_direct(file.pool(), file.path(), Access::ReadWrite);
    let odd = odd.await.unwrap();
    assert!(!odd.is_direct());
    odd.write(4096, Bytes::from(vec![1; 100])).await.unwrap();
    assert_eq!(odd.read(4095, 2).await.unwrap()[..], [0, 1]);
    assert_eq!(odd.size(), 4196);
}
