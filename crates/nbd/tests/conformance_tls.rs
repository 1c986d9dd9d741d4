//! STARTTLS with the clients people use: libnbd and QEMU, both over GnuTLS.

#[path = "fixture/authority.rs"]
mod authority;
#[allow(dead_code)]
mod fixture;
#[allow(dead_code)]
mod memory;

use authority::Authority;
use fixture::{Fixture, MIB, content, write};
use whimbrel_nbd::Tls;

/// A server of the authority, and a client's directory `pki` that trusts it.
fn secured(authority: &Authority, tls: Tls) -> Fixture {
    let fixture = Fixture::with_tls(16 * MIB, tls);
    authority.client(&fixture.path("pki"), Some(authority));
    fixture
}

fn nbds(fixture: &Fixture, export: &str) -> String {
    let pki = fixture.arg("pki");
    format!(
        "nbds://localhost:{}/{export}?tls-certificates={pki}",
        fixture.port
    )
}

fn nbds_unix(fixture: &Fixture, export: &str) -> String {
    let (pki, socket) = (fixture.arg("pki"), fixture.arg("nbd"));
    format!("nbds+unix:///{export}?socket={socket}&tls-certificates={pki}&tls-verify-peer=false")
}

/// Arguments by which QEMU's tools reach an export over TLS.
fn qemu(fixture: &Fixture, export: &str) -> [String; 3] {
    [
        "--object".to_owned(),
        format!(
            "tls-creds-x509,id=tls0,endpoint=client,dir={}",
            fixture.arg("pki")
        ),
        format!(
            "driver=raw,file.driver=nbd,file.host=localhost,file.port={},file.export={export},file.tls-creds=tls0",
            fixture.port
        ),
    ]
}

#[test]
fn nbdinfo_reads_over_tls_where_it_is_allowed_and_where_it_is_required() {
    let authority = Authority::new();
    for clients in [false, true] {
        let config = authority.server(clients);
        for tls in [Tls::Allowed(config.clone()), Tls::Required(config)] {
            let fixture = secured(&authority, tls);
            for uri in [nbds(&fixture, "disk"), nbds_unix(&fixture, "disk")] {
                let info = fixture.run("nbdinfo", &["--json", &uri]);
                assert!(info.contains("\"TLS\": true"), "{info}");
                let list = fixture.run("nbdinfo", &["--list", "--json", &uri]);
                assert!(list.contains("\"export-name\": \"ro\""), "{list}");
            }
        }
    }
}

#[test]
fn a_plain_client_is_served_where_tls_is_allowed_and_told_where_it_is_required() {
    let authority = Authority::new();
    let config = authority.server(false);
    let allowed = secured(&authority, Tls::Allowed(config.clone()));
    let info = allowed.run("nbdinfo", &["--json", &allowed.uri("disk")]);
    assert!(info.contains("\"TLS\": false"), "{info}");
    let required = secured(&authority, Tls::Required(config));
    required.fail("nbdinfo", &[&required.uri("disk")]);
    let said = required.fail(
        "qemu-io",
        &["-f", "raw", "-c", "read 0 512", &required.uri("disk")],
    );
    assert!(said.contains("TLS"), "{said}");
}

#[test]
fn a_client_that_insists_on_tls_leaves_a_server_without() {
    let authority = Authority::new();
    let fixture = secured(&authority, Tls::Off);
    fixture.fail("nbdinfo", &[&nbds(&fixture, "disk")]);
    let [object, creds, image] = qemu(&fixture, "disk");
    let args = [&object, &creds, "--image-opts", &image, "-c", "read 0 512"];
    let said = fixture.fail("qemu-io", &args);
    assert!(said.contains("TLS"), "{said}");
}

#[test]
fn a_client_without_a_certificate_or_with_a_strangers_is_turned_away() {
    let (authority, stranger) = (Authority::new(), Authority::new());
    for issuer in [None, Some(&stranger)] {
        let fixture = Fixture::with_tls(MIB, Tls::Required(authority.server(true)));
        authority.client(&fixture.path("pki"), issuer);
        fixture.fail("nbdinfo", &[&nbds(&fixture, "disk")]);
        // The server is none the worse for it.
        authority.client(&fixture.path("good"), Some(&authority));
        let uri = nbds(&fixture, "disk").replace("pki", "good");
        fixture.run("nbdinfo", &[&uri]);
    }
}

#[test]
fn a_client_that_does_not_trust_the_server_leaves() {
    let (authority, stranger) = (Authority::new(), Authority::new());
    let fixture = Fixture::with_tls(MIB, Tls::Allowed(authority.server(false)));
    stranger.client(&fixture.path("pki"), None);
    fixture.fail("nbdinfo", &[&nbds(&fixture, "disk")]);
    let plain = fixture.uri("disk");
    fixture.run("nbdinfo", &[&plain]);
}

#[test]
fn nbdcopy_in_and_out_over_tls() {
    let authority = Authority::new();
    let fixture = secured(&authority, Tls::Required(authority.server(true)));
    let (source, back) = (fixture.arg("source"), fixture.arg("back"));
    let bytes = content(16 << 20);
    write(source.as_ref(), &bytes);
    let uri = nbds(&fixture, "disk");
    fixture.run(
        "nbdcopy",
        &["--connections=4", "--requests=32", "--flush", &source, &uri],
    );
    fixture.run("nbdcopy", &["--request-size=4194304", &uri, &back]);
    assert!(std::fs::read(&back).unwrap() == bytes);
}

#[test]
fn qemu_img_and_qemu_io_over_tls() {
    let authority = Authority::new();
    let fixture = secured(&authority, Tls::Required(authority.server(true)));
    let [object, creds, image] = qemu(&fixture, "disk");
    let raw = fixture.arg("raw");
    write(raw.as_ref(), &content(16 << 20));
    let source = format!("driver=raw,file.driver=file,file.filename={raw}");
    let convert = [
        "convert",
        &object,
        &creds,
        "-n",
        "--image-opts",
        "--target-image-opts",
    ];
    fixture.run(
        "qemu-img",
        &[&convert[..], &["-W", "-m", "8", &source, &image]].concat(),
    );
    let compare = ["compare", &object, &creds, "--image-opts", &source, &image];
    fixture.run("qemu-img", &compare);
    let script = [
        "-c",
        "write -P 7 1M 3M",
        "-c",
        "write -z 2M 64k",
        "-c",
        "flush",
    ];
    let script = [
        &script[..],
        &["-c", "read -P 0 2M 64k", "-c", "read -P 7 3M 1M"],
    ]
    .concat();
    let out = fixture.run(
        "qemu-io",
        &[
            &[object.as_str(), &creds, "--image-opts", &image],
            &script[..],
        ]
        .concat(),
    );
    assert!(!out.contains("failed"), "{out}");
}

#[test]
fn libnbd_falls_back_to_plain_only_if_it_may() {
    let fixture = Fixture::new(MIB);
    fixture.nbdsh(
        r"
assert h.supports_tls()
h.set_tls(nbd.TLS_ALLOW)
h.set_uri_allow_tls(nbd.TLS_ALLOW)
h.connect_uri(uri)
assert not h.get_tls_negotiated()
h.pread(512, 0)
",
    );
}

#[test]
fn what_was_agreed_before_tls_is_forgotten() {
    let authority = Authority::new();
    let fixture = secured(&authority, Tls::Allowed(authority.server(false)));
    // libnbd asks for structured replies only after TLS, and gets them.
    fixture.nbdsh(
        r"
h.set_tls(nbd.TLS_REQUIRE)
h.set_tls_certificates(dir + '/pki')
h.add_meta_context('base:allocation')
h.set_export_name('disk')
h.connect_tcp('localhost', str(port))
assert h.get_tls_negotiated() and h.get_structured_replies_negotiated()
h.pwrite(b't' * 65536, 65536)
assert h.pread(65536, 65536) == b't' * 65536
assert status(h, 1 << 20, 0) == {'base:allocation': [65536, 3, 65536, 0, 917504, 3]}
h.shutdown()
",
    );
}
