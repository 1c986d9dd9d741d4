//! Raw volumes on a real file system.

use super::*;
use crate::pool::PoolSize;
use proptest::prelude::*;

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

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]
    #[test]
    fn a_volume_is_an_array_of_bytes(ops in proptest::collection::vec(op(), 1..12)) {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        runtime.block_on(async {
            let size = 400_001;
            let (_dir, file) = fresh(size).await;
            let mut model = vec![0u8; size as usize];
            for op in ops {
                match op {
                    Op::Write(o, l, b) => {
                        file.write(o, Bytes::from(vec![b; l])).await.unwrap();
                        model[o as usize..o as usize + l].fill(b);
                    }
                    Op::Zero(o, l, no_hole) => {
                        let how = Zeroes { no_hole, fast_only: false };
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
        });
    }
}
