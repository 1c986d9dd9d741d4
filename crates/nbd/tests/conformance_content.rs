//! Content in and out with the clients people use, by every way they have of moving it.

#[allow(dead_code)]
mod fixture;
#[allow(dead_code)]
mod memory;

use std::io::{BufRead, BufReader, Write};
use std::process::Stdio;

use fixture::{Fixture, MIB, command, content, write};

#[test]
fn nbdcopy_in_and_out_by_every_way_of_copying() {
    for options in [
        &[][..],
        &["--synchronous"],
        &["--connections=4", "--requests=64", "--flush"],
        &["--request-size=4194304", "--destination-is-zero"],
        &["--allocated"],
    ] {
        for export in ["disk", "plain", "unaligned"] {
            let fixture = Fixture::new(16 * MIB);
            let mut bytes = content(16 << 20);
            bytes.truncate(bytes.len() - usize::from(export == "unaligned"));
            let (source, back) = (fixture.arg("source"), fixture.arg("back"));
            write(source.as_ref(), &bytes);
            let uri = fixture.uri(export);
            fixture.run("nbdcopy", &[options, &[&source, &uri]].concat());
            fixture.run("nbdcopy", &[options, &[&uri, &back]].concat());
            let same = std::fs::read(&back).unwrap() == bytes;
            assert!(same, "{export} {options:?}");
        }
    }
}

#[test]
fn zeroes_stay_holes_on_the_way_in_and_out() {
    let fixture = Fixture::new(64 * MIB);
    let (source, back, uri) = (
        fixture.arg("source"),
        fixture.arg("back"),
        fixture.uri("disk"),
    );
    let file = std::fs::File::create(&source).unwrap();
    file.set_len(64 * MIB).unwrap();
    fixture.run(
        "qemu-io",
        &["-f", "raw", "-c", "write -P 3 32M 1M", &source],
    );
    fixture.run("nbdcopy", &[&source, &uri]);
    let totals = fixture.run("nbdinfo", &["--map", "--totals", &uri]);
    let data: Vec<_> = totals
        .lines()
        .filter(|line| line.contains("data"))
        .collect();
    assert_eq!(data.len(), 1, "{totals}");
    assert!(data[0].trim_start().starts_with("1048576 "), "{totals}");
    fixture.run("nbdcopy", &[&uri, &back]);
    use std::os::unix::fs::MetadataExt;
    let allocated = std::fs::metadata(&back).unwrap().blocks() * 512;
    assert!(allocated <= 2 * MIB, "{allocated}");
}

#[test]
fn qemu_img_converts_in_and_out_and_finds_no_difference() {
    let fixture = Fixture::new(16 * MIB);
    let (uri, raw, copy) = (fixture.uri("disk"), fixture.arg("raw"), fixture.arg("copy"));
    write(raw.as_ref(), &content(16 << 20));
    let info = fixture.run("qemu-img", &["info", "-f", "raw", &uri]);
    assert!(info.contains("virtual size: 16 MiB"), "{info}");
    let compare = ["compare", "-f", "raw", "-F", "raw", &raw, &uri];
    for parallel in [&["-S", "0"][..], &[], &["-m", "16", "-W"]] {
        let both = ["convert", "-n", "-f", "raw", "-O", "raw", &raw, &uri];
        fixture.run("qemu-img", &[&both[..1], parallel, &both[1..]].concat());
        fixture.run("qemu-img", &compare);
    }
    let out = ["convert", "-f", "raw", "-O", "qcow2", &uri, &copy];
    fixture.run("qemu-img", &out);
    let back = ["compare", "-f", "raw", "-F", "qcow2", &raw, &copy];
    fixture.run("qemu-img", &back);
    fixture.qemu_io("disk", &["write -P 0x77 9M 512"]);
    let said = fixture.fail("qemu-img", &compare);
    assert!(
        said.contains("Content mismatch at offset 9437184"),
        "{said}"
    );
}

#[test]
fn qemu_img_maps_data_and_holes() {
    let fixture = Fixture::new(8 << 30);
    fixture.qemu_io("disk", &["write 5G 64k"]);
    let args = ["map", "-f", "raw", "--output=json", &fixture.uri("disk")];
    let map = fixture.run("qemu-img", &args);
    let rows: Vec<_> = map.lines().collect();
    assert_eq!(rows.len(), 3, "{map}");
    for (row, expected) in rows.iter().zip([
        ["\"start\": 0, \"length\": 5368709120,", "\"data\": false"],
        [
            "\"start\": 5368709120, \"length\": 65536,",
            "\"data\": true",
        ],
        [
            "\"start\": 5368774656, \"length\": 3221159936,",
            "\"data\": false",
        ],
    ]) {
        assert!(expected.iter().all(|part| row.contains(part)), "{map}");
    }
}

#[test]
fn qemu_img_bench_reads_writes_and_flushes() {
    let fixture = Fixture::new(16 * MIB);
    let uri = fixture.uri("disk");
    for options in [
        &["-s", "4096", "-d", "64"][..],
        &["-s", "4096", "-d", "64", "-w", "--pattern=7"],
        &["-s", "512", "-d", "1", "-w", "--flush-interval=16"],
        &["-s", "1048576", "-d", "4", "-w", "-t", "writethrough"],
    ] {
        let bench = ["bench", "-f", "raw", "-c", "500"];
        fixture.run("qemu-img", &[&bench[..], options, &[&uri]].concat());
    }
}

#[test]
fn a_qcow2_image_lives_inside_an_export() {
    let fixture = Fixture::new(16 * MIB);
    let uri = fixture.uri("plain");
    fixture.run("qemu-img", &["create", "-f", "qcow2", &uri, "64M"]);
    let commands = ["-c", "write -P 9 1M 3M", "-c", "discard 2M 1M"];
    fixture.run(
        "qemu-io",
        &[&["-f", "qcow2"], &commands[..], &[&uri]].concat(),
    );
    fixture.run("qemu-io", &["-f", "qcow2", "-c", "read -P 9 1M 1M", &uri]);
    fixture.run("qemu-img", &["check", "-f", "qcow2", &uri]);
}

#[test]
fn qemu_io_writes_zeroes_discards_and_flushes() {
    let fixture = Fixture::new(16 * MIB);
    for commands in [
        &["write -P 0x11 0 1M", "read -P 0x11 0 1M"][..],
        &[
            "write -f -P 0x22 512 512",
            "read -P 0x22 512 512",
            "read -P 0x11 1024 512",
        ],
        &["write -z 4k 64k", "read -P 0 4k 64k", "read -P 0x11 68k 4k"],
        &["write -z -u 128k 128k", "read -P 0 128k 128k"],
        &["write -z -u -n 256k 4k", "read -P 0 256k 4k"],
        &["discard 512k 512k", "read -P 0 512k 512k"],
        &[
            "aio_write -P 0x33 1M 8M",
            "aio_read -P 0x11 68k 4k",
            "aio_flush",
            "flush",
        ],
        &["read -P 0x33 1M 8M"],
        &[
            "writev -P 0x44 10M 512 4096 512 1M",
            "readv -P 0x44 10M 1M 4096 1024",
        ],
    ] {
        fixture.qemu_io("disk", commands);
    }
}

#[test]
fn qemu_zeroes_8_gib_in_one_request() {
    let fixture = Fixture::new(8 << 30);
    let uri = fixture.uri("disk");
    fixture.qemu_io("disk", &["write -P 1 6G 64k"]);
    let traced = ["--trace", "nbd_send_request", "-f", "raw"];
    let script = ["-c", "write -z -u -n 0 8G", "-c", "read -P 0 6G 64k", &uri];
    let output = fixture.try_run("qemu-io", &[&traced[..], &script].concat());
    let trace = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{trace}");
    assert!(trace.contains(".from = 0, .len = 8589934592,"), "{trace}");
}

#[test]
fn qemu_reconnects_to_a_restarted_server_and_sees_no_error() {
    let mut fixture = Fixture::new(16 * MIB);
    let options = format!(
        "driver=nbd,server.type=unix,server.path={},export=disk,reconnect-delay=60",
        fixture.path("nbd").display()
    );
    let mut qemu = command("qemu-io")
        .args(["--image-opts", &options])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut say = qemu.stdin.take().unwrap();
    let mut lines = BufReader::new(qemu.stdout.take().unwrap()).lines();
    let mut hear = |word: &str| {
        for line in lines.by_ref() {
            let line = line.unwrap();
            let wrong = line.contains("failed") || line.contains("error");
            assert!(!wrong, "{line}");
            if line.contains(word) {
                return;
            }
        }
        panic!("qemu-io ended without {word}");
    };
    for pattern in 1..6 {
        writeln!(say, "write -P {pattern} 4k 64k").unwrap();
        hear("wrote 65536");
        fixture.restart();
        writeln!(say, "read -P {pattern} 4k 64k").unwrap();
        hear("read 65536");
    }
    writeln!(say, "quit").unwrap();
    assert!(qemu.wait().unwrap().success());
}

#[test]
fn fio_finds_what_it_wrote() {
    let fixture = Fixture::new(32 * MIB);
    for (rw, size, depth) in [
        ("randwrite", "4k", 32),
        ("write", "256k", 8),
        ("randrw", "4k", 64),
        ("randwrite", "512-64k", 16),
    ] {
        let uri = format!("--uri={}", fixture.uri("disk"));
        let (rw, size) = (format!("--rw={rw}"), format!("--bsrange={size}"));
        let size = size.replace("=4k", "=4k-4k").replace("=256k", "=256k-256k");
        let depth = format!("--iodepth={depth}");
        let fixed = [
            "--name=verify",
            "--ioengine=nbd",
            "--size=16m",
            "--bs_unaligned=0",
            "--verify=crc32c",
            "--verify_fatal=1",
            "--do_verify=1",
            "--randseed=7",
        ];
        let chosen = [uri.as_str(), &rw, &size, &depth];
        let said = fixture.run("fio", &[&fixed[..], &chosen].concat());
        assert!(said.contains("err= 0"), "{said}");
    }
}

#[test]
fn libnbd_many_requests_of_many_sizes_in_flight() {
    Fixture::new(64 * MIB).nbdsh(
        r"
random.seed(7)
h.connect_uri(uri)
pos = 0
want = []
while True:
    size = 512 * random.choice([1, 3, 8, 64, 513, 2048, 8192])
    if pos + size > h.get_size(): break
    data = random.randbytes(size)
    want.append((pos, data))
    h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(data)), pos)
    pos += size
    while h.aio_in_flight() > 64: h.poll(-1)
while h.aio_in_flight(): h.poll(-1)
random.shuffle(want)
reads = []
for pos, data in want:
    buf = nbd.Buffer(len(data))
    reads.append((h.aio_pread(buf, pos), buf, data))
while h.aio_in_flight(): h.poll(-1)
for cookie, buf, data in reads:
    assert h.aio_command_completed(cookie)
    assert buf.to_bytearray() == data
h.shutdown()
",
    );
}

#[test]
fn libnbd_from_one_byte_to_32_mib_at_any_offset() {
    Fixture::new(40 * MIB).nbdsh(
        r"
random.seed(11)
h.connect_uri(uri.replace('disk', 'unaligned'))
size = h.get_size()
assert size == (40 << 20) - 1
model = bytearray(size)
noise = random.randbytes(32 << 20)
short = [1, 2, 511, 512, 513, 4095, 65537] * 3
for length in short + [(1 << 20) + 1, (32 << 20) - 1, 32 << 20]:
    for offset in [0, 1, size - length, random.randrange(size - length)]:
        what = random.randrange(4)
        if what == 0:
            h.zero(length, offset, flags=random.choice([0, nbd.CMD_FLAG_NO_HOLE, nbd.CMD_FLAG_FUA]))
            model[offset:offset + length] = bytes(length)
        elif what == 1:
            h.trim(length, offset)
            model[offset:offset + length] = bytes(length)
        else:
            data = noise[-length:]
            h.pwrite(data, offset)
            model[offset:offset + length] = data
        assert h.pread(length, offset) == model[offset:offset + length], (length, offset)
h.shutdown()
",
    );
}

#[test]
fn libnbd_reads_holes_as_holes_and_in_one_chunk_with_df() {
    Fixture::new(4 * MIB).nbdsh(
        r"
h.connect_uri(uri)
assert h.get_structured_replies_negotiated() and h.can_df()
h.pwrite(b'd' * 32768, 65536)
def chunks(flags):
    seen = []
    data = h.pread_structured(262144, 0, lambda buf, off, status, err: seen.append((off, len(buf), status)), flags=flags)
    assert data == bytearray(65536) + b'd' * 32768 + bytearray(163840)
    return seen
assert chunks(0) == [(0, 65536, nbd.READ_HOLE), (65536, 32768, nbd.READ_DATA), (98304, 163840, nbd.READ_HOLE)]
assert chunks(nbd.CMD_FLAG_DF) == [(0, 262144, nbd.READ_DATA)]
h.shutdown()
",
    );
}

#[test]
fn a_request_that_waits_holds_up_no_other() {
    Fixture::new(MIB).nbdsh(
        r"
h.connect_uri(uri.replace('disk', 'faulty'))
buf = nbd.Buffer(512)
waits = h.aio_pread(buf, 9 << 20)
for at in range(32): assert h.pread(512, at * 512) == bytearray(512)
assert not h.aio_command_completed(waits)
h.trim(512, 9 << 20)
while h.aio_in_flight(): h.poll(-1)
assert h.aio_command_completed(waits)
h.shutdown()
",
    );
}

#[test]
fn a_flush_on_one_connection_covers_the_others_and_all_see_the_same() {
    Fixture::new(4 * MIB).nbdsh(
        r"
all = [nbd.NBD() for _ in range(4)]
for h in all: h.connect_uri(uri)
assert all[0].can_multi_conn()
for turn in range(16):
    writer, other = all[turn % 4], all[(turn + 1) % 4]
    writer.pwrite(bytes([turn + 1]) * 4096, turn * 4096)
    other.flush()
    for h in all: assert h.pread(4096, turn * 4096) == bytes([turn + 1]) * 4096
for h in all: h.shutdown()
",
    );
}
