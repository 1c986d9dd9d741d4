//! Negotiation with the clients people use.

#[allow(dead_code)]
mod fixture;
#[allow(dead_code)]
mod memory;

use fixture::{Fixture, MIB};

#[test]
fn nbdinfo_lists_and_describes() {
    let fixture = Fixture::new(16 * MIB);
    let all = fixture.run("nbdinfo", &["--list", "--json", &fixture.uri("")]);
    for expected in [
        "\"export-name\": \"disk\"",
        "\"export-name\": \"faulty\"",
        "\"export-name\": \"plain\"",
        "\"export-name\": \"ro\"",
        "\"export-name\": \"unaligned\"",
        "\"structured\": true",
        "\"base:allocation\"",
        "\"is_read_only\": true",
        "\"can_cache\": true",
        "\"can_df\": true",
        "\"can_fast_zero\": true",
        "\"can_flush\": true",
        "\"can_fua\": true",
        "\"can_multi_conn\": true",
        "\"can_trim\": true",
        "\"can_zero\": true",
        "\"block_size_minimum\": 1,",
        "\"block_size_minimum\": 512",
        "\"block_size_preferred\": 4096",
        "\"block_size_maximum\": 33554432",
        "\"export-size\": 16777216",
        "\"export-size\": 16777215",
    ] {
        assert!(all.contains(expected), "{expected}\n{all}");
    }
    let one = fixture.run("nbdinfo", &["--json", &fixture.uri("disk")]);
    let description = "\"description\": \"whimbrel memory\"";
    assert!(one.contains(description), "{one}");
    assert_eq!(
        fixture.run("nbdinfo", &["--size", &fixture.uri("")]),
        "16777216\n"
    );
    for what in ["read-only", "connect"] {
        fixture.run("nbdinfo", &["--is", what, &fixture.uri("ro")]);
    }
    fixture.fail("nbdinfo", &["--can", "write", &fixture.uri("ro")]);
    fixture.fail("nbdinfo", &[&fixture.uri("nowhere")]);
}

#[test]
fn nbdinfo_maps_what_was_written() {
    let fixture = Fixture::new(8 * MIB);
    fixture.qemu_io("disk", &["write 1M 64k"]);
    let map = fixture.run("nbdinfo", &["--map", &fixture.uri("disk")]);
    let rows: Vec<Vec<&str>> = map
        .lines()
        .map(|l| l.split_whitespace().collect())
        .collect();
    assert_eq!(
        rows,
        [
            ["0", "1048576", "3", "hole,zero"],
            ["1048576", "65536", "0", "data"],
            ["1114112", "7274496", "3", "hole,zero"],
        ]
    );
}

#[test]
fn libnbd_options_one_by_one() {
    Fixture::new(4 * MIB).nbdsh(
        r"
h.set_opt_mode(True)
h.connect_uri(uri)
names = []
h.opt_list(lambda name, description: names.append(name))
assert names == ['disk', 'faulty', 'plain', 'ro', 'unaligned'], names
contexts = []
h.opt_list_meta_context(lambda name: contexts.append(name))
assert contexts == ['base:allocation'], contexts
h.set_export_name('nowhere')
fails('ENOENT', h.opt_go)
h.set_export_name('ro')
h.opt_info()
assert h.is_read_only() and not h.can_trim() and not h.can_zero() and not h.can_fua()
assert h.can_flush() and h.can_cache() and h.can_multi_conn()
h.set_export_name('unaligned')
h.opt_info()
assert h.get_block_size(nbd.SIZE_MINIMUM) == 1
assert h.get_block_size(nbd.SIZE_PREFERRED) == 4096
assert h.get_block_size(nbd.SIZE_MAXIMUM) == 32 << 20
h.set_export_name('disk')
h.set_full_info(True)
h.opt_info()
assert h.get_canonical_export_name() == 'disk'
assert h.get_export_description() == 'whimbrel memory'
h.opt_go()
h.pread(512, 0)
h.shutdown()
h = nbd.NBD()
h.set_opt_mode(True)
h.connect_uri(uri)
h.opt_abort()
",
    );
}

#[test]
fn libnbd_old_handshakes() {
    Fixture::new(4 * MIB).nbdsh(
        r"
for flags in [0, nbd.HANDSHAKE_FLAG_FIXED_NEWSTYLE, nbd.HANDSHAKE_FLAG_FIXED_NEWSTYLE | nbd.HANDSHAKE_FLAG_NO_ZEROES]:
    h = nbd.NBD()
    h.set_handshake_flags(flags)
    h.connect_uri(uri)
    assert h.get_size() == 4 << 20
    h.pread(512, 0)
    h.shutdown()
",
    );
}

#[test]
fn libnbd_selects_contexts_that_exist() {
    Fixture::new(4 * MIB).nbdsh(
        r"
h.add_meta_context('base:allocation')
h.add_meta_context('unknown:context')
h.connect_uri(uri)
assert h.can_meta_context('base:allocation')
assert not h.can_meta_context('unknown:context')
h.pwrite(b'd' * 65536, 65536)
whole = status(h, 4194304, 0)
assert whole == {'base:allocation': [65536, 3, 65536, 0, 4063232, 3]}, whole
one = status(h, 4194304, 0, flags=nbd.CMD_FLAG_REQ_ONE)
assert one == {'base:allocation': [65536, 3]}, one
short = status(h, 512, 70000 // 512 * 512, flags=nbd.CMD_FLAG_REQ_ONE)
assert short == {'base:allocation': [512, 0]}, short
h.shutdown()
",
    );
}

#[test]
fn two_contexts_are_answered_for_side_by_side() {
    let fixture = Fixture::new(4 * MIB);
    fixture.nbdsh(
        r"
h.add_meta_context('base:allocation')
h.add_meta_context('whimbrel:residency')
h.connect_uri(uri.replace('disk', 'unaligned'))
h.pwrite(b'd' * 32768, 32768)
both = status(h, 1 << 20, 0)
assert both == {
    'base:allocation': [32768, 3, 32768, 0, 983040, 3],
    'whimbrel:residency': [32768, 0, 32768, 1, 983040, 0],
}, both
h.shutdown()
",
    );
    let uri = fixture.uri("unaligned");
    let map = fixture.run("nbdinfo", &["--map=whimbrel:residency", &uri]);
    let rows: Vec<Vec<&str>> = map
        .lines()
        .map(|l| l.split_whitespace().collect())
        .collect();
    assert_eq!(
        rows,
        [
            ["0", "32768", "0"],
            ["32768", "32768", "1"],
            ["65536", "4128767", "0"]
        ]
    );
}

#[test]
fn libnbd_without_structured_replies_has_everything_but_status_and_df() {
    Fixture::new(4 * MIB).nbdsh(
        r"
h.set_request_structured_replies(False)
h.connect_uri(uri)
assert not h.can_df()
h.pwrite(b'd' * 65536, 65536, flags=nbd.CMD_FLAG_FUA)
assert h.pread(131072, 0) == bytearray(65536) + b'd' * 65536
h.set_strict_mode(0)
fails('EINVAL', lambda: h.pread(512, 1 << 40))
fails('EINVAL', lambda: h.pread(512, 0, flags=nbd.CMD_FLAG_DF))
h.zero(65536, 65536)
h.trim(65536, 0)
h.cache(65536, 0)
h.flush()
assert h.pread(65536, 65536) == bytearray(65536)
h.shutdown()
",
    );
}

#[test]
fn qemu_agrees_on_extended_headers() {
    let fixture = Fixture::new(8 << 30);
    let uri = fixture.uri("disk");
    let args = [
        "--trace",
        "nbd_*",
        "-f",
        "raw",
        "-c",
        "write -P 5 5G 64k",
        "-c",
        "read -P 5 5G 64k",
        "-c",
        "map",
        &uri,
    ];
    let output = fixture.try_run("qemu-io", &args);
    let trace = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{trace}");
    let agreed = "Received option reply 11 (extended headers), type 1 (ack)";
    assert!(trace.contains(agreed), "{trace}");
    assert!(trace.contains("(block status (64-bit))"), "{trace}");
    let map = String::from_utf8_lossy(&output.stdout);
    assert!(!map.contains("failed"), "{map}");
}
