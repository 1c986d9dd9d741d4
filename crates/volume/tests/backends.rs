//! Every backend against a disk in memory, against QEMU's own tools, and through the death of its process.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use bytes::Bytes;
use proptest::prelude::*;
use whimbrel_volume::VolumeError;
use whimbrel_volume::backend::{Backend, Format, ImageFault, check_image, copy, resize};
use whimbrel_volume::pool::{Pool, PoolSize};
use whimbrel_volume::raw::{Access, Zeroes};

const MIB: u64 = 1 << 20;

fn pool() -> Pool {
    Pool::start(PoolSize::default()).unwrap()
}

fn run(program: &str, args: &[&str]) -> String {
    let out = Command::new(program).args(args).output().unwrap();
    assert!(
        out.status.success(),
        "{program} {args:?}: {}{}",
        String::from_utf8_lossy(&out.stdout),
        String::from_utf8_lossy(&out.stderr)
    );
    String::from_utf8(out.stdout).unwrap()
}

fn image_is_whole(path: &Path) {
    run("qemu-img", &["check", "-q", path.to_str().unwrap()]);
}

fn allocated(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata(path).unwrap().blocks() * 512
}

/// A loop device over a file; `None` where this machine lets nobody have one.
struct Loop(PathBuf);

impl Loop {
    fn over(file: &Path) -> Option<Loop> {
        let out = Command::new("losetup")
            .args(["--find", "--show"])
            .arg(file)
            .output()
            .ok()?;
        let name = String::from_utf8(out.stdout).ok()?;
        out.status
            .success()
            .then(|| Loop(PathBuf::from(name.trim())))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup")
            .arg("--detach")
            .arg(&self.0)
            .status();
    }
}

/// A disk of each kind, empty, with what must outlive it.
async fn disks(dir: &Path, size: u64) -> Vec<(Backend, PathBuf, Option<Loop>)> {
    let pool = pool();
    let mut disks = Vec::new();
    for format in [Format::Raw, Format::Qcow2] {
        let path = dir.join(format.to_string());
        let disk = Backend::create(&pool, &path, format, size).await.unwrap();
        disks.push((disk, path, None));
    }
    let under = dir.join("under-device");
    std::fs::File::create(&under)
        .unwrap()
        .set_len(size)
        .unwrap();
    if let Some(device) = Loop::over(&under) {
        let disk = Backend::open(&pool, &device.0, Format::Device, Access::ReadWrite);
        disks.push((disk.await.unwrap(), under, Some(device)));
    }
    disks
}

#[derive(Clone, Debug)]
enum Deed {
    Write { at: u64, len: u64, fill: u8 },
    Zero { at: u64, len: u64, no_hole: bool },
    Discard { at: u64, len: u64 },
    Sync,
}

const SIZE: u64 = 3 * MIB + 512 * 3;

fn deeds() -> impl Strategy<Value = Vec<Deed>> {
    let range = (0..SIZE, 1..400_000u64).prop_map(|(at, len)| (at, len.min(SIZE - at)));
    let aligned = (0..SIZE / 4096, 1..80u64)
        .prop_map(|(at, len)| (at * 4096, (len * 4096).min(SIZE - at * 4096)));
    let range = prop_oneof![range, aligned];
    let deed = prop_oneof![
        4 => (range.clone(), 1..=255u8).prop_map(|((at, len), fill)| Deed::Write { at, len, fill }),
        1 => (range.clone(), any::<bool>()).prop_map(|((at, len), no_hole)| Deed::Zero { at, len, no_hole }),
        2 => range.prop_map(|(at, len)| Deed::Discard { at, len }),
        1 => Just(Deed::Sync),
    ];
    prop::collection::vec(deed, 1..40)
}

async fn apply(disk: &Backend, model: &mut [u8], deed: &Deed) {
    match *deed {
        Deed::Write { at, len, fill } => {
            disk.write(at, Bytes::from(vec![fill; len as usize]))
                .await
                .unwrap();
            model[at as usize..(at + len) as usize].fill(fill);
        }
        Deed::Zero { at, len, no_hole } => {
            let how = Zeroes {
                no_hole,
                fast_only: false,
            };
            disk.write_zeroes(at, len, how).await.unwrap();
            model[at as usize..(at + len) as usize].fill(0);
        }
        Deed::Discard { at, len } => {
            disk.discard(at, len).await.unwrap();
            // A device zeroes whole blocks and leaves the rest.
            let (from, to) = match disk.format() {
                Format::Device => (at.next_multiple_of(512), (at + len) / 512 * 512),
                Format::Raw | Format::Qcow2 => (at, at + len),
            };
            if from < to {
                model[from as usize..to as usize].fill(0);
            }
        }
        Deed::Sync => disk.sync().await.unwrap(),
    }
}

async fn agrees(disk: &Backend, model: &[u8]) {
    let read = disk.read(0, model.len()).await.unwrap();
    assert!(read[..] == *model, "content differs on {}", disk.format());
    let runs = disk.data_extents(0, model.len() as u64).await.unwrap();
    let mut at = 0;
    for run in &runs {
        assert_eq!(run.offset, at, "{runs:?}");
        at += run.len;
        let part = &model[run.offset as usize..at as usize];
        assert!(run.data || part.iter().all(|&b| b == 0), "a hole with data");
    }
    assert_eq!(at, model.len() as u64);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]
    #[test]
    fn every_backend_is_a_disk(deeds in deeds()) {
        tokio::runtime::Runtime::new().unwrap().block_on(async {
            let dir = tempfile::tempdir().unwrap();
            for (disk, path, device) in disks(dir.path(), SIZE).await {
                let mut model = vec![0; SIZE as usize];
                for deed in &deeds {
                    apply(&disk, &mut model, deed).await;
                }
                agrees(&disk, &model).await;
                let format = disk.format();
                drop(disk);
                if format == Format::Qcow2 {
                    image_is_whole(&path);
                }
                let at = device.as_ref().map_or(&path, |d| &d.0);
                let again = Backend::open(&pool(), at, format, Access::ReadOnly).await.unwrap();
                agrees(&again, &model).await;
            }
        });
    }
}

#[tokio::test]
async fn room_that_is_given_back_is_free_on_every_backend() {
    let dir = tempfile::tempdir().unwrap();
    let pool = pool();
    let under = dir.path().join("under-device");
    std::fs::File::create(&under)
        .unwrap()
        .set_len(64 * MIB)
        .unwrap();
    for (disk, path, _device) in disks(dir.path(), 64 * MIB).await {
        disk.write(0, Bytes::from(vec![5; 32 << 20])).await.unwrap();
        disk.sync().await.unwrap();
        let full = allocated(&path);
        assert!(full >= 32 * MIB);
        disk.discard(MIB, 30 * MIB).await.unwrap();
        disk.sync().await.unwrap();
        let left = allocated(&path);
        assert!(left < 4 * MIB, "{}: {left} bytes left", disk.format());
        assert_eq!(disk.read(MIB - 1, 2).await.unwrap()[..], [5, 0]);
    }
    drop(pool);
}

#[tokio::test]
async fn a_copy_is_as_sparse_as_its_source_in_every_combination() {
    let dir = tempfile::tempdir().unwrap();
    let sources = dir.path().join("from");
    std::fs::create_dir(&sources).unwrap();
    for (from, from_path, _kept) in disks(&sources, 256 * MIB).await {
        for n in 0..40 {
            from.write(
                n * 6 * MIB + 8192,
                Bytes::from(vec![n as u8 + 1; 128 << 10]),
            )
            .await
            .unwrap();
        }
        from.sync().await.unwrap();
        let targets = tempfile::tempdir_in(dir.path()).unwrap();
        for (to, to_path, _kept) in disks(targets.path(), 300 * MIB).await {
            let mut last = 0;
            copy(&from, &to, |done| {
                assert!(done >= last);
                last = done;
            })
            .await
            .unwrap();
            assert_eq!(last, 256 * MIB);
            let (a, b) = (allocated(&from_path), allocated(&to_path));
            // The tables of an image are not of the guest's: five clusters at most here. A copy from a
            // device is made of what is not zero, in grains of 64 KiB.
            let tables = if to.format() == Format::Qcow2 {
                5 * 65536
            } else {
                0
            };
            let grains = if from.format() != Format::Device {
                0
            } else {
                40 * 2 * 65536
            };
            assert!(
                b <= a + a / 100 + tables + grains,
                "{} to {}: {a} became {b}",
                from.format(),
                to.format()
            );
            for n in [0, 17, 39] {
                let at = n * 6 * MIB;
                let same =
                    from.read(at, 1 << 20).await.unwrap() == to.read(at, 1 << 20).await.unwrap();
                assert!(same);
            }
        }
    }
}

#[tokio::test]
async fn a_smaller_target_is_refused_before_anything_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let pool = pool();
    let from = Backend::create(&pool, dir.path().join("a"), Format::Raw, 2 * MIB)
        .await
        .unwrap();
    let to = Backend::create(&pool, dir.path().join("b"), Format::Qcow2, MIB)
        .await
        .unwrap();
    let refused = copy(&from, &to, |_| {}).await.unwrap_err();
    assert!(matches!(refused, VolumeError::TooSmall { needed, .. } if needed == 2 * MIB));
}

#[tokio::test]
async fn a_chain_made_by_qemu_reads_the_same_and_only_its_top_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    let (base, middle, top) = (path("base.raw"), path("middle.qcow2"), path("top.qcow2"));
    run("qemu-img", &["create", "-q", "-f", "raw", &base, "8M"]);
    run(
        "qemu-io",
        &[
            "-f",
            "raw",
            "-c",
            "write -P 1 0 1M",
            "-c",
            "write -P 2 4M 64k",
            &base,
        ],
    );
    run(
        "qemu-img",
        &[
            "create", "-q", "-f", "qcow2", "-b", &base, "-F", "raw", &middle,
        ],
    );
    run(
        "qemu-io",
        &["-c", "write -P 3 512k 64k", "-c", "write -z 4M 4k", &middle],
    );
    run(
        "qemu-img",
        &[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-b",
            "middle.qcow2",
            "-F",
            "qcow2",
            &top,
            "10M",
        ],
    );
    run("qemu-io", &["-c", "write -P 4 768k 512", &top]);
    let below = [
        std::fs::read(&base).unwrap(),
        std::fs::read(&middle).unwrap(),
    ];
    let pool = pool();
    let disk = Backend::open(&pool, &top, Format::Qcow2, Access::ReadWrite)
        .await
        .unwrap();
    assert_eq!(disk.size(), 10 * MIB);
    let flat = path("flat.raw");
    run("qemu-img", &["convert", "-O", "raw", "-U", &top, &flat]);
    let mut model = std::fs::read(&flat).unwrap();
    agrees(&disk, &model).await;
    let holes: u64 = disk
        .data_extents(0, disk.size())
        .await
        .unwrap()
        .iter()
        .filter(|r| !r.data)
        .map(|r| r.len)
        .sum();
    assert!(holes > 8 * MIB, "{holes}");
    for deed in [
        Deed::Write {
            at: 600_000,
            len: 3,
            fill: 9,
        },
        Deed::Discard {
            at: 0,
            len: 200_000,
        },
        Deed::Write {
            at: 9 * MIB + 1,
            len: 70_000,
            fill: 8,
        },
        Deed::Zero {
            at: 4 * MIB - 5,
            len: 10_000,
            no_hole: false,
        },
    ] {
        apply(&disk, &mut model, &deed).await;
    }
    agrees(&disk, &model).await;
    drop(disk);
    image_is_whole(Path::new(&top));
    run("qemu-img", &["convert", "-O", "raw", &top, &flat]);
    assert!(std::fs::read(&flat).unwrap() == model);
    assert!(
        below
            == [
                std::fs::read(&base).unwrap(),
                std::fs::read(&middle).unwrap()
            ]
    );
}

#[tokio::test]
async fn compressed_clusters_are_read_and_written_around() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    let (raw, image) = (path("raw"), path("image"));
    let mut model: Vec<u8> = (0..4u64 << 20).map(|n| (n / 700) as u8).collect();
    std::fs::write(&raw, &model).unwrap();
    run("qemu-img", &["convert", "-c", "-O", "qcow2", &raw, &image]);
    let pool = pool();
    let disk = Backend::open(&pool, &image, Format::Qcow2, Access::ReadWrite)
        .await
        .unwrap();
    agrees(&disk, &model).await;
    for deed in [
        Deed::Write {
            at: 100_000,
            len: 5000,
            fill: 9,
        },
        Deed::Discard {
            at: 1_000_000,
            len: 500_000,
        },
        Deed::Write {
            at: 1_200_000,
            len: 70_000,
            fill: 8,
        },
    ] {
        apply(&disk, &mut model, &deed).await;
    }
    agrees(&disk, &model).await;
    drop(disk);
    image_is_whole(Path::new(&image));
}

#[tokio::test]
async fn images_that_cannot_be_written_safely_say_why() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    let pool = pool();
    let old = path("old");
    run(
        "qemu-img",
        &["create", "-q", "-f", "qcow2", "-o", "compat=v2", &old, "1M"],
    );
    let snapshot = path("snapshot");
    run(
        "qemu-img",
        &["create", "-q", "-f", "qcow2", &snapshot, "1M"],
    );
    run("qemu-img", &["snapshot", "-c", "s", &snapshot]);
    let aside = path("aside");
    let options = format!("data_file={}", path("data"));
    run(
        "qemu-img",
        &["create", "-q", "-f", "qcow2", "-o", &options, &aside, "1M"],
    );
    let unnamed = path("unnamed");
    run(
        "qemu-img",
        &["create", "-q", "-f", "raw", &path("base"), "1M"],
    );
    run(
        "qemu-img",
        &[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-b",
            &path("base"),
            "-F",
            "raw",
            &unnamed,
        ],
    );
    // The note of the format, made unreadable.
    let mut bytes = std::fs::read(&unnamed).unwrap();
    let at = bytes
        .windows(4)
        .position(|w| w == [0xe2, 0x79, 0x2a, 0xca])
        .unwrap();
    bytes[at] = 0x11;
    std::fs::write(&unnamed, bytes).unwrap();
    let circle = path("circle");
    run("qemu-img", &["create", "-q", "-f", "qcow2", &circle, "1M"]);
    run(
        "qemu-img",
        &["rebase", "-u", "-b", "circle", "-F", "qcow2", &circle],
    );
    let nothing = path("nothing");
    std::fs::write(&nothing, vec![1; 70_000]).unwrap();
    for (image, fault) in [
        (&old, ImageFault::OldVersion),
        (&snapshot, ImageFault::Snapshots(1)),
        (&aside, ImageFault::ExternalData),
        (&unnamed, ImageFault::BackingFormat(path("base"))),
        (&circle, ImageFault::TooDeep),
        (&nothing, ImageFault::NotQcow2),
    ] {
        let refused = Backend::open(&pool, image, Format::Qcow2, Access::ReadWrite).await;
        match refused.err().unwrap() {
            VolumeError::Image { fault: found, .. } => assert_eq!(found, fault),
            other => panic!("{image}: {other}"),
        }
    }
    for image in [&old, &snapshot, &aside] {
        let disk = Backend::open(&pool, image, Format::Qcow2, Access::ReadOnly)
            .await
            .unwrap();
        assert_eq!(disk.read(0, 512).await.unwrap()[..], [0; 512]);
    }
}

#[tokio::test]
async fn an_image_has_one_writer_and_a_mounted_device_none() {
    let dir = tempfile::tempdir().unwrap();
    let pool = pool();
    let image = dir.path().join("image");
    let first = Backend::create(&pool, &image, Format::Qcow2, MIB)
        .await
        .unwrap();
    let second = Backend::open(&pool, &image, Format::Qcow2, Access::ReadWrite).await;
    assert!(matches!(second.err().unwrap(), VolumeError::InUse { .. }));
    drop(first);
    Backend::open(&pool, &image, Format::Qcow2, Access::ReadWrite)
        .await
        .unwrap();

    let file = dir.path().join("file");
    std::fs::File::create(&file)
        .unwrap()
        .set_len(16 * MIB)
        .unwrap();
    run("mkfs.ext4", &["-q", file.to_str().unwrap()]);
    let Some(device) = Loop::over(&file) else {
        return;
    };
    let mount = dir.path().join("mnt");
    std::fs::create_dir(&mount).unwrap();
    let (name, at) = (device.0.to_str().unwrap(), mount.to_str().unwrap());
    if Command::new("mount")
        .args([name, at])
        .stderr(Stdio::null())
        .status()
        .unwrap()
        .success()
    {
        let refused = Backend::open(&pool, &device.0, Format::Device, Access::ReadWrite).await;
        run("umount", &[at]);
        assert!(matches!(refused.err().unwrap(), VolumeError::InUse { .. }));
    }
    let plain = Backend::open(&pool, &file, Format::Device, Access::ReadWrite).await;
    assert!(matches!(
        plain.err().unwrap(),
        VolumeError::NotADevice { .. }
    ));
}

#[tokio::test]
async fn a_disk_that_grows_reads_zero_in_what_was_added() {
    let dir = tempfile::tempdir().unwrap();
    let pool = pool();
    for format in [Format::Raw, Format::Qcow2] {
        let path = dir.path().join(format.to_string());
        let disk = Backend::create(&pool, &path, format, MIB).await.unwrap();
        disk.write(MIB - 512, Bytes::from(vec![7; 512]))
            .await
            .unwrap();
        drop(disk);
        for size in [700 * MIB, MIB - 512, 2 * MIB] {
            resize(&pool, path.clone(), format, size).await.unwrap();
        }
        let disk = Backend::open(&pool, &path, format, Access::ReadWrite)
            .await
            .unwrap();
        assert_eq!(disk.size(), 2 * MIB);
        let read = disk.read(0, 2 << 20).await.unwrap();
        assert!(read.iter().all(|&b| b == 0), "what was cut off is gone");
        drop(disk);
        if format == Format::Qcow2 {
            image_is_whole(&path);
        }
    }
}

#[tokio::test]
async fn a_disk_of_a_tebibyte_opens_at_once_and_takes_next_to_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let pool = pool();
    for format in [Format::Raw, Format::Qcow2] {
        let path = dir.path().join(format.to_string());
        drop(
            Backend::create(&pool, &path, format, 1 << 40)
                .await
                .unwrap(),
        );
        let disk = Backend::open(&pool, &path, format, Access::ReadWrite)
            .await
            .unwrap();
        disk.write((1 << 40) - 512, Bytes::from(vec![1; 512]))
            .await
            .unwrap();
        let runs = disk.data_extents(0, 1 << 40).await.unwrap();
        assert!(runs.len() <= 3, "{runs:?}");
        assert!(disk.allocated().await.unwrap() < MIB);
    }
}

/// The other end of the test below: writes, syncs, and says what is synced, until it is killed.
#[tokio::test]
async fn writer_that_is_killed() {
    let Ok(path) = std::env::var("WHIMBREL_TEST_VICTIM") else {
        return;
    };
    let disk = Backend::open(&pool(), path, Format::Qcow2, Access::ReadWrite)
        .await
        .unwrap();
    for n in 0u64.. {
        let place = n * 7919 % 4096;
        let at = place * 96 * 1024;
        if n % 5 == 4 {
            disk.discard((n * 31 % 2048) * MIB / 4 + (1 << 30), 3 * MIB)
                .await
                .unwrap();
            disk.write(
                (n * 31 % 2048) * MIB / 4 + (1 << 30),
                Bytes::from(vec![0xdd; 2 << 20]),
            )
            .await
            .unwrap();
        }
        let mark = Bytes::from((n + 1).to_le_bytes().repeat(512));
        disk.write(at, mark).await.unwrap();
        if n % 3 == 2 {
            disk.sync().await.unwrap();
            println!("synced {n}");
        }
    }
}

#[tokio::test]
async fn an_image_whose_writer_was_killed_has_all_that_was_synced() {
    use std::io::{BufRead, BufReader};
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    let pool = pool();
    drop(
        Backend::create(&pool, &path, Format::Qcow2, 2 << 30)
            .await
            .unwrap(),
    );
    let mut repaired = 0;
    for round in 0..8 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "writer_that_is_killed", "--nocapture"])
            .env("WHIMBREL_TEST_VICTIM", &path)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut synced = 0;
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        for _ in 0..20 + round * 7 {
            let line = lines.next().unwrap().unwrap();
            if let Some(n) = line.rsplit("synced ").next().and_then(|n| n.parse().ok()) {
                synced = n;
            }
        }
        child.kill().unwrap();
        child.wait().unwrap();
        let found = check_image(&pool, path.clone(), false).await.unwrap();
        assert!(found.dirty);
        repaired += found.missing + found.leaked;
        let disk = Backend::open(&pool, &path, Format::Qcow2, Access::ReadWrite)
            .await
            .unwrap();
        for n in 0u64..=synced {
            let at = n * 7919 % 4096 * 96 * 1024;
            let read = disk.read(at, 4096).await.unwrap();
            let mark = u64::from_le_bytes(read[..8].try_into().unwrap());
            // This round's, or an earlier round's that came further: never nothing, never another's.
            assert!(
                mark > n && (mark - n - 1).is_multiple_of(4096),
                "{n}: {mark}"
            );
        }
        drop(disk);
        image_is_whole(&path);
    }
    println!("{repaired} counts put right");
}
