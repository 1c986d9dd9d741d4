//! A real guest: booted under QEMU without KVM, loaded, stopped in both ways, and its disk verified.

mod guest_support;

use guest_support::{Guest, small_disk, small_params};
use std::time::{Duration, Instant};
use whimbrel_lab::guest::{Ack, DiskSpec, Line, Outcome, Params, cache_dir, verify};
use whimbrel_workload::params::{Pace, RamAccess, RamMode};
use whimbrel_workload::report::Workload;

fn is_start(line: &Line) -> bool {
    matches!(line, Line::Start(_))
}

fn is_report(line: &Line) -> bool {
    matches!(line, Line::Report(_))
}

fn ack_of(outcome: &Outcome) -> Ack {
    Ack {
        seq: outcome.last_fsynced_seq,
        generation: outcome.last_fsynced_generation,
    }
}

#[test]
fn a_guest_works_and_leaves_a_disk_that_verifies() {
    let dir = tempfile::tempdir().expect("a folder");
    let disk = small_disk();
    let image = dir.path().join("disk.raw");
    disk.copy_to(&image).expect("copied");
    let mut guest = Guest::start(dir.path(), &image, 256, small_params());
    let (_, boot) = guest.wait_for(is_start);
    guest.wait_for(is_report);
    let cpu = guest.cpu_seconds();
    let lines = guest.listen(Duration::from_secs(10));
    let cpu = (guest.cpu_seconds() - cpu) / 10.0;
    println!(
        "boot to workloads {boot:.1?}; {:.0} % of one processor",
        cpu * 100.0
    );
    for line in lines.iter().filter(|l| is_report(l)) {
        println!("{}", line.to_json());
    }

    assert_eq!(guest.echo(b"are you there"), b"are you there");
    let mut control = guest.control();
    control.pause().expect("paused");
    let status = control.status().expect("status");
    assert!(status.paused && status.parked);
    control
        .pace(Workload::Log, Pace::PerSecond(5))
        .expect("a pace");
    control.resume().expect("resumed");
    control.sync().expect("synced");
    let outcome = control.poweroff().expect("an outcome");
    assert!(guest.ended(), "QEMU ends with its guest");
    println!("{outcome:?}");
    assert_eq!((outcome.errors, &outcome.faults[..]), (0, &[][..]));
    assert!(outcome.unmounted);
    assert_eq!(outcome.ram_pages_checked, 16 * 256);
    let totals = outcome.totals;
    assert!(totals.ram_pages > 0 && totals.ram_checks > 0 && totals.log_records > 0);
    assert!(totals.random_writes > 0 && totals.random_checks > 0 && totals.files_read > 0);
    assert_eq!(totals.echoes, 1);
    let on_console: Vec<Line> = guest.console().lines().filter_map(Line::find).collect();
    assert!(on_console.iter().any(is_start) && on_console.iter().any(is_report));
    assert_eq!(on_console.last(), Some(&Line::Result(outcome.clone())));
    assert!(guest.acknowledged.seq > 0 && guest.acknowledged.generation > 0);

    let report = verify(&image, &disk.manifest, ack_of(&outcome)).expect("the tools run");
    assert_eq!(report.failures, []);
    assert!(!report.journal_replayed);
    assert_eq!(report.last_seq, outcome.last_fsynced_seq);
    assert_eq!(report.last_generation, outcome.last_fsynced_generation);
    assert_eq!(report.files_checked, disk.manifest.files.len() as u64);
}

#[test]
fn what_was_acknowledged_is_there_after_a_power_cut_and_the_guest_goes_on_from_it() {
    let dir = tempfile::tempdir().expect("a folder");
    let disk = small_disk();
    let image = dir.path().join("disk.raw");
    disk.copy_to(&image).expect("copied");
    let mut params = small_params();
    params.ram.mode = RamMode::Word;
    params.ram.access = RamAccess::Zipf;
    params.ram.region_mib = 32;
    params.log.max_mib = 1;
    params.log.record_bytes = 512;
    params.log.pace = Pace::Max;
    params.random.pace = Pace::Max;
    let mut guest = Guest::start(dir.path(), &image, 256, params.clone());
    guest.wait_for(is_start);
    guest.listen(Duration::from_secs(4));
    guest.kill();
    guest.listen(Duration::from_millis(300));
    let acknowledged = guest.acknowledged;
    drop(guest);
    println!("acknowledged {acknowledged:?}");
    assert!(acknowledged.seq > 0 && acknowledged.generation > 0);
    let report = verify(&image, &disk.manifest, acknowledged).expect("the tools run");
    assert_eq!(report.failures, []);
    assert!(report.journal_replayed);

    let mut guest = Guest::start(dir.path(), &image, 256, params);
    let (line, _) = guest.wait_for(is_start);
    let Line::Start(start) = line else {
        panic!("a start");
    };
    assert!(start.recovered_seq >= acknowledged.seq, "{start:?}");
    assert!(start.recovered_generation >= acknowledged.generation);
    guest.listen(Duration::from_secs(2));
    let outcome = guest.control().poweroff().expect("an outcome");
    assert!(guest.ended(), "QEMU ends with its guest");
    assert_eq!((outcome.errors, &outcome.faults[..]), (0, &[][..]));
    assert!(outcome.last_fsynced_seq > start.recovered_seq);
    let report = verify(&image, &disk.manifest, ack_of(&outcome)).expect("the tools run");
    assert_eq!(report.failures, []);
}

#[test]
#[ignore = "for its figures: a 2 GiB disk with 600 MiB of files, minutes when it is built anew"]
fn the_demo_guest_in_figures() {
    let dir = tempfile::tempdir_in(cache_dir()).expect("a folder");
    let began = Instant::now();
    let disk = DiskSpec::default()
        .build(dir.path())
        .expect("the disk builds");
    let files = disk.manifest.files.len();
    println!(
        "disk built in {:.1?}: {files} files, {} bytes",
        began.elapsed(),
        disk.manifest.bytes()
    );
    let began = Instant::now();
    DiskSpec::default()
        .build(dir.path())
        .expect("the disk is there");
    println!("a second time in {:.1?}", began.elapsed());
    let image = dir.path().join("disk.raw");
    let began = Instant::now();
    disk.copy_to(&image).expect("copied");
    println!("copied in {:.1?}", began.elapsed());
    let mut guest = Guest::start(dir.path(), &image, 512, Params::default());
    let (_, boot) = guest.wait_for(is_start);
    println!("boot to workloads {boot:.1?}");
    for _ in 0..3 {
        let cpu = guest.cpu_seconds();
        let lines = guest.listen(Duration::from_secs(10));
        println!(
            "{:.0} % of one processor",
            (guest.cpu_seconds() - cpu) * 10.0
        );
        if let Some(line) = lines.iter().rfind(|l| is_report(l)) {
            println!("{}", line.to_json());
        }
    }
    let began = Instant::now();
    let outcome = guest.control().poweroff().expect("an outcome");
    println!("poweroff answered in {:.1?}: {outcome:?}", began.elapsed());
    assert!(guest.ended(), "QEMU ends with its guest");
    let began = Instant::now();
    let report = verify(&image, &disk.manifest, ack_of(&outcome)).expect("the tools run");
    println!("verified in {:.1?}: {report:?}", began.elapsed());
    assert_eq!((outcome.errors, &report.failures[..]), (0, &[][..]));
}
