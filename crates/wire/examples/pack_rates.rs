//! What packing costs and gains on this machine: every level on the files named, 256 KiB at a time.
//!
//! ```text
//! cargo run --release -p whimbrel-wire --example pack_rates -- /usr/bin/bash /var/log/syslog
//! ```

use std::time::Instant;

use whimbrel_wire::pack::{Packer, unpack};

const PIECE: usize = 256 << 10;

fn main() -> std::io::Result<()> {
    println!(
        "{:>8} {:>6} {:>8} {:>9} {:>9}  file",
        "MiB", "level", "share", "pack", "unpack"
    );
    for path in std::env::args().skip(1) {
        let content = std::fs::read(&path)?;
        for level in [-5, -1, 1, 3, 6, 9] {
            let mut packer = Packer::default();
            let (mut wire, mut packing, mut unpacking) = (0, 0.0, 0.0);
            for piece in content.chunks(PIECE) {
                let began = Instant::now();
                let packed = (!packer.is_dense(piece))
                    .then(|| packer.pack(piece, level))
                    .flatten();
                packing += began.elapsed().as_secs_f64();
                let Some(packed) = packed else {
                    wire += piece.len();
                    continue;
                };
                let began = Instant::now();
                let back = unpack(&packed, piece.len()).expect("what was packed");
                unpacking += began.elapsed().as_secs_f64();
                assert_eq!(back, piece);
                wire += packed.len();
            }
            let mb = content.len() as f64 / 1e6;
            println!(
                "{:>8.1} {level:>6} {:>7.1}% {:>4.0} MB/s {:>4.0} MB/s  {path}",
                content.len() as f64 / f64::from(1 << 20),
                100.0 * wire as f64 / content.len() as f64,
                mb / packing,
                mb / unpacking,
            );
        }
    }
    Ok(())
}
