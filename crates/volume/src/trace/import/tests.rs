use super::*;
use proptest::prelude::*;

/// Time, whether it writes, offset, length.
type Line = (u64, bool, u64, u64);

fn taken(text: &str) -> Result<(Taken, Vec<Line>), TraceError> {
    of_device(text, None)
}

fn of_device(text: &str, device: Option<&str>) -> Result<(Taken, Vec<Line>), TraceError> {
    let mut all = Vec::new();
    let taken = import(text.as_bytes(), None, device, |r| {
        all.push((r.at_us, r.kind == AccessKind::Write, r.offset, r.len));
    })?;
    Ok((taken, all))
}

const BLKPARSE: &str = "\
  8,0    3        1     0.000000000   697  Q   W 223490 + 8 [kjournald]
  8,0    3        2     0.000001829   697  G   W 223490 + 8 [kjournald]
  8,0    3        3     0.000002000     0  m   N cfq697 insert_request
  8,0    1        4     0.250001000   698  Q  RA 16 + 256 [cat]
  8,0    1        5     0.260001000   698  Q FWS [jbd2/sda1-8]
  8,0    1        6     0.270001000   698  Q  DS 0 + 1024 [fstrim]
CPU3 (8,0):
 Reads Queued:           1,      128KiB
Throughput (R/W): 0KiB/s / 0KiB/s
";

const IOLOG3: &str = "\
fio version 3 iolog
22 /dev/vda add
158 /dev/vda open
161 /dev/vda read 1011712 4096
248 /dev/vda write 12419072 512
300 /dev/vda datasync 0 0
400 /dev/vda close
";

const MSR: &str = "\
128166372003061629,src1,0,Read,7014609920,24576,41286
128166372016382155,src1,0,Write,1317441536,8192,1963
";

const CLOUD: &str = "\
version,time,op,size,lbn
1,5633898,2a,512,42932745
1,5633900,28,4096,16
1,5633900,42,4096,16
";

const QEMU: &str = "\
qemu-system-x86_64: warning: something
7@1795368350.693264:virtio_blk_handle_write vdev 0x5559f6e0aec0 req 0x55 sector 4470336 nsectors 8
7@1795368350.709227:virtio_blk_handle_read vdev 0x5559f6e0aec0 req 0x55 sector 8 nsectors 1
";

#[test]
fn blkparse_gives_what_was_queued_and_ends_at_its_summary() {
    let (taken, all) = taken(BLKPARSE).unwrap();
    assert_eq!(taken.format, Some(Foreign::Blkparse));
    assert_eq!(taken.skipped, 2);
    assert_eq!(
        all,
        [
            (0, true, 223_490 * 512, 4096),
            (250_001, false, 8192, 131_072)
        ]
    );
}

#[test]
fn iologs_have_their_own_times_or_add_up_their_waits() {
    let (taken_3, all) = taken(IOLOG3).unwrap();
    assert_eq!(
        (taken_3.format, taken_3.skipped),
        (Some(Foreign::FioIolog), 1)
    );
    assert_eq!(
        all,
        [(0, false, 1_011_712, 4096), (87, true, 12_419_072, 512)]
    );
    let two = "fio version 2 iolog\nf add\nf read 0 8\nf wait 1500 0\nf wait 10 0\nf write 8 8\n";
    let (_, all) = taken(two).unwrap();
    assert_eq!(all, [(0, false, 0, 8), (1510, true, 8, 8)]);
}

#[test]
fn msr_counts_in_tenths_of_microseconds() {
    let (taken, all) = taken(MSR).unwrap();
    assert_eq!(taken.format, Some(Foreign::MsrCsv));
    assert_eq!(
        all,
        [
            (0, false, 7_014_609_920, 24_576),
            (1_332_053, true, 1_317_441_536, 8192)
        ]
    );
}

#[test]
fn cloudphysics_counts_in_seconds_or_microseconds() {
    let (taken_, all) = taken(CLOUD).unwrap();
    assert_eq!(
        (taken_.format, taken_.skipped),
        (Some(Foreign::CloudPhysicsCsv), 1)
    );
    assert_eq!(
        all,
        [
            (0, true, 42_932_745 * 512, 512),
            (2_000_000, false, 8192, 4096)
        ]
    );
    let (_, all) = taken("1,5633898000000,28,512,0\n1,5633898000007,28,512,0\n").unwrap();
    assert_eq!(all[1].0, 7);
}

#[test]
fn qemu_says_other_things_between_its_events() {
    let (first, rest) = QEMU.split_once('\n').unwrap();
    let (taken, all) = taken(rest).unwrap();
    assert_eq!(taken.format, Some(Foreign::QemuVirtioBlk));
    assert_eq!(
        all,
        [(0, true, 4_470_336 * 512, 4096), (15_963, false, 4096, 512)]
    );
    let again = format!("{rest}{first}\n");
    assert_eq!(self::taken(&again).unwrap().0.records, 2);
}

#[test]
fn an_error_names_its_line_and_what_was_expected() {
    let spoilt = CLOUD.replace("1,5633900,28", "1,5633900,zz");
    let error = taken(&spoilt).unwrap_err().to_string();
    assert_eq!(
        error,
        "line 3: expected a SCSI operation code in hexadecimal, found `1,5633900,zz,4096,16`"
    );
    let error = taken(&IOLOG3.replace("write 12419072 512", "write 12419072")).unwrap_err();
    assert!(matches!(error, TraceError::Line { line: 5, .. }), "{error}");
    let far = format!("1,2,28,512,{}", u64::MAX);
    assert!(taken(&far).is_err());
    let error = taken(&"x".repeat(5000)).unwrap_err();
    assert!(matches!(error, TraceError::LongLine { line: 1 }));
    assert!(matches!(taken("hello\n"), Err(TraceError::Unknown { .. })));
    assert!(matches!(taken(""), Err(TraceError::Empty { .. })));
}

#[test]
fn of_several_devices_one_is_to_be_named() {
    let two = MSR.replacen(",src1,0,Write", ",src1,1,Write", 1);
    assert!(matches!(
        taken(&two),
        Err(TraceError::SeveralDevices { line: 2, .. })
    ));
    assert_eq!(of_device(&two, Some("1")).unwrap().0.records, 1);
    assert!(matches!(
        of_device(&two, Some("7")),
        Err(TraceError::Empty { .. })
    ));
}

#[test]
fn time_never_goes_back() {
    let back = "1,100,28,512,0\n1,99,28,512,0\n1,101,28,512,0\n";
    let times: Vec<_> = taken(back).unwrap().1.iter().map(|r| r.0).collect();
    assert_eq!(times, [0, 0, 1_000_000]);
}

proptest! {
    #[test]
    fn no_text_makes_an_import_panic(sample in 0..5usize, at in any::<usize>(), junk in prop::collection::vec(any::<u8>(), 0..60), format in 0..6usize) {
        let mut bytes = [BLKPARSE, IOLOG3, MSR, CLOUD, QEMU][sample].as_bytes().to_vec();
        let at = at % bytes.len();
        bytes.splice(at..(at + junk.len() / 2).min(bytes.len()), junk);
        let format = Foreign::ALL.get(format).copied();
        let mut last = 0;
        let _ = import(bytes.as_slice(), format, None, |r| {
            assert!(r.len > 0 && r.offset + r.len <= REACH && r.at_us >= last);
            last = r.at_us;
        });
    }
}
