//! What a TUN device hands over in one read: one packet, or a burst of TCP segments still in one piece.
//!
//! With segmentation offload on, the kernel gives a sender's up-to-64-KiB burst as a single packet with
//! a `virtio_net_hdr` that says how to cut it (`gso_size`). Cutting it into 1500-byte packets here and
//! passing each through two system calls is what makes userspace networks slow; not cutting it would make
//! the emulated link coarse (64 KiB are 5 ms at 100 Mbit/s) and lose 45 packets where it should lose one.
//!
//! So the line sees every segment as the packet it would be on the wire, and the bytes stay in one
//! piece: a *segment* is an index into its burst. Segments of one burst that arrive together are written
//! together, as a shorter burst: the original headers, patched, and a slice of the original payload.
//!
//! Layouts: `struct virtio_net_hdr` of 10 bytes (virtio 1.2, 5.1.6, the legacy form: native endian, as
//! TUN uses it), IPv4 (RFC 791), TCP (RFC 9293). Only TCP over IPv4 is ever in bursts: that is all the
//! offload we ask the kernel for. Anything else is one packet and passes unread.
//!
//! The TCP checksum of a burst is *partial*: the field holds the sum of the pseudo-header only, and the
//! receiving kernel, told so by `NEEDS_CSUM`, trusts the rest. The pseudo-header contains the length,
//! so a shorter burst needs a new sum, but never a pass over the payload.

use std::ops::Range;

/// Bytes of `virtio_net_hdr` before each packet.
pub const VNET_HEADER: usize = 10;

/// The longest packet a TUN device hands over, its `virtio_net_hdr` included.
pub const READ_BOUND: usize = VNET_HEADER + 65_536;

/// The longest headers in front of a run's payload: virtio, IPv4 with options, TCP with options.
pub const HEAD_BOUND: usize = VNET_HEADER + 60 + 60;

const NEEDS_CSUM: u8 = 1;
const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_ECN: u8 = 0x80;

const TCP: u8 = 6;
const TCP_CHECKSUM_AT: usize = 16;
const FLAG_FIN: u8 = 0x01;
const FLAG_PSH: u8 = 0x08;
const FLAG_CWR: u8 = 0x80;

/// One read from a TUN device, the `virtio_net_hdr` included.
#[derive(Debug)]
pub struct Burst {
    bytes: Box<[u8]>,
    cut: Option<Cut>,
}

/// How a burst falls into segments.
#[derive(Clone, Copy, Debug)]
struct Cut {
    ip_header: usize,
    tcp_header: usize,
    /// Payload bytes in each segment but the last.
    payload: usize,
    segments: usize,
}

/// A burst that cannot be cut as its header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BurstError {
    #[error("{0} bytes are too short for a packet")]
    Short(usize),
    #[error("segmentation kind {0} was not asked for")]
    Kind(u8),
    #[error("a burst that is not TCP over IPv4, or whose lengths contradict each other")]
    Shape,
}

impl Burst {
    /// Takes the bytes of one read.
    pub fn parse(bytes: &[u8]) -> Result<Burst, BurstError> {
        if bytes.len() <= VNET_HEADER {
            return Err(BurstError::Short(bytes.len()));
        }
        let cut = match bytes[1] & !GSO_ECN {
            GSO_NONE => None,
            GSO_TCPV4 => Some(Cut::parse(bytes).ok_or(BurstError::Shape)?),
            other => return Err(BurstError::Kind(other)),
        };
        Ok(Burst {
            bytes: bytes.into(),
            cut,
        })
    }

    /// Packets this would be on the wire, at least 1.
    pub fn segments(&self) -> usize {
        self.cut.map_or(1, |cut| cut.segments)
    }

    /// Length of a segment as an IP packet, in bytes.
    pub fn segment_bytes(&self, index: usize) -> u32 {
        let length = match self.cut {
            None => self.bytes.len() - VNET_HEADER,
            Some(cut) => {
                let payload = self.payload_of(cut, index..index + 1);
                cut.ip_header + cut.tcp_header + payload.len()
            }
        };
        u32::try_from(length).expect("a packet is shorter than READ_BOUND")
    }

    /// What to write for the segments `run` in one write: a head put into `head`, whose length is
    /// returned, and the payload to follow it.
    pub fn write_run(&self, run: Range<usize>, head: &mut [u8; HEAD_BOUND]) -> (usize, &[u8]) {
        let whole = run.start == 0 && run.end == self.segments();
        let Some(cut) = self.cut.filter(|_| !whole) else {
            head[..VNET_HEADER].copy_from_slice(&self.bytes[..VNET_HEADER]);
            return (VNET_HEADER, &self.bytes[VNET_HEADER..]);
        };
        let payload = self.payload_of(cut, run.clone());
        let length = VNET_HEADER + cut.ip_header + cut.tcp_header;
        head[..length].copy_from_slice(&self.bytes[..length]);
        let (virtio, packet) = head[..length].split_at_mut(VNET_HEADER);
        patch_virtio(virtio, cut, run.len());
        let (ip, tcp) = packet.split_at_mut(cut.ip_header);
        patch_ip(ip, cut.tcp_header + payload.len(), run.start);
        let skipped = payload.start - (VNET_HEADER + cut.ip_header + cut.tcp_header);
        patch_tcp(tcp, skipped, run.start == 0, run.end == cut.segments);
        let sum = pseudo_header_sum(ip, cut.tcp_header + payload.len());
        put16(tcp, TCP_CHECKSUM_AT, sum);
        (length, &self.bytes[payload])
    }

    /// Where the payload of a run of segments lies in `bytes`.
    fn payload_of(&self, cut: Cut, run: Range<usize>) -> Range<usize> {
        let first = VNET_HEADER + cut.ip_header + cut.tcp_header;
        let end = first + run.end * cut.payload;
        first + run.start * cut.payload..end.min(self.bytes.len())
    }
}

impl Cut {
    fn parse(bytes: &[u8]) -> Option<Cut> {
        let payload = usize::from(u16::from_ne_bytes([bytes[4], bytes[5]]));
        let packet = &bytes[VNET_HEADER..];
        let ip_header = usize::from(packet[0] & 0x0f) * 4;
        if packet[0] >> 4 != 4 || !(20..=60).contains(&ip_header) || *packet.get(9)? != TCP {
            return None;
        }
        let tcp_header = usize::from(packet.get(ip_header + 12)? >> 4) * 4;
        let total = packet.len().checked_sub(ip_header + tcp_header)?;
        if !(20..=60).contains(&tcp_header) || payload == 0 || total == 0 {
            return None;
        }
        Some(Cut {
            ip_header,
            tcp_header,
            payload,
            segments: total.div_ceil(payload),
        })
    }
}

fn patch_virtio(virtio: &mut [u8], cut: Cut, segments: usize) {
    let headers = (cut.ip_header + cut.tcp_header) as u16;
    virtio[0] = NEEDS_CSUM;
    if segments == 1 {
        virtio[1] = GSO_NONE;
        virtio[4..6].fill(0);
    }
    virtio[2..4].copy_from_slice(&headers.to_ne_bytes());
    virtio[6..8].copy_from_slice(&(cut.ip_header as u16).to_ne_bytes());
    virtio[8..10].copy_from_slice(&(TCP_CHECKSUM_AT as u16).to_ne_bytes());
}

fn patch_ip(ip: &mut [u8], content: usize, segments_before: usize) {
    let total = (ip.len() + content) as u16;
    put16(ip, 2, total);
    let id = get16(ip, 4).wrapping_add(segments_before as u16);
    put16(ip, 4, id);
    put16(ip, 10, 0);
    let sum = !fold(sum16(ip));
    put16(ip, 10, sum);
}

fn patch_tcp(tcp: &mut [u8], bytes_before: usize, is_first: bool, is_last: bool) {
    let sequence = u32::from_be_bytes([tcp[4], tcp[5], tcp[6], tcp[7]]);
    let sequence = sequence.wrapping_add(bytes_before as u32);
    tcp[4..8].copy_from_slice(&sequence.to_be_bytes());
    if !is_first {
        tcp[13] &= !FLAG_CWR;
    }
    if !is_last {
        tcp[13] &= !(FLAG_FIN | FLAG_PSH);
    }
}

/// The sum, not complemented, that a partial checksum starts from.
fn pseudo_header_sum(ip: &[u8], tcp_bytes: usize) -> u16 {
    fold(sum16(&ip[12..20]) + u32::from(TCP) + tcp_bytes as u32)
}

/// Sum of the big-endian 16-bit words of an even number of bytes (at most 64 KiB, so it cannot overflow).
fn sum16(bytes: &[u8]) -> u32 {
    bytes
        .chunks_exact(2)
        .map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])))
        .sum()
}

fn fold(mut sum: u32) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

fn get16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

fn put16(bytes: &mut [u8], at: usize, value: u16) {
    bytes[at..at + 2].copy_from_slice(&value.to_be_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A burst of `payload` bytes 0, 1, 2, ... to be cut at `mss`, with FIN, PSH and CWR set.
    fn burst(payload: usize, mss: u16) -> Vec<u8> {
        let mut bytes = vec![NEEDS_CSUM, GSO_TCPV4 | GSO_ECN, 52, 0];
        bytes.extend(mss.to_ne_bytes());
        bytes.extend(20u16.to_ne_bytes());
        bytes.extend(16u16.to_ne_bytes());
        let mut ip = vec![
            0x45, 0, 0, 0, 0xff, 0xff, 0x40, 0, 64, TCP, 0, 0, 10, 77, 0, 1, 10, 77, 0, 2,
        ];
        patch_ip(&mut ip, 32 + payload, 0);
        let mut tcp = vec![0; 32];
        tcp[4..8].copy_from_slice(&0xffff_ff00u32.to_be_bytes());
        tcp[12] = 8 << 4;
        tcp[13] = FLAG_FIN | FLAG_PSH | FLAG_CWR | 0x10;
        let sum = pseudo_header_sum(&ip, 32 + payload);
        put16(&mut tcp, 16, sum);
        bytes.extend(ip);
        bytes.extend(tcp);
        bytes.extend((0..payload).map(|n| n as u8));
        bytes
    }

    fn written(burst: &Burst, run: Range<usize>) -> Vec<u8> {
        let mut head = [0; HEAD_BOUND];
        let (length, payload) = burst.write_run(run, &mut head);
        [&head[..length], payload].concat()
    }

    #[test]
    fn a_plain_packet_passes_as_it_came() {
        let bytes: Vec<u8> = (0..60).map(|n| if n < 10 { 0 } else { n }).collect();
        let burst = Burst::parse(&bytes).unwrap();
        assert_eq!((burst.segments(), burst.segment_bytes(0)), (1, 50));
        assert_eq!(written(&burst, 0..1), bytes);
    }

    #[test]
    fn a_whole_burst_passes_as_it_came() {
        let bytes = burst(4000, 1448);
        let burst = Burst::parse(&bytes).unwrap();
        let lengths: Vec<_> = (0..burst.segments())
            .map(|n| burst.segment_bytes(n))
            .collect();
        assert_eq!(lengths, [1500, 1500, 1104 + 52]);
        assert_eq!(written(&burst, 0..3), bytes);
    }

    #[test]
    fn runs_of_a_burst_are_bursts_of_their_own_and_join_to_the_whole() {
        let bytes = burst(10_000, 1448);
        let whole = Burst::parse(&bytes).unwrap();
        let mut joined = Vec::new();
        for run in [0..1, 1..4, 4..6, 6..7] {
            let part = written(&whole, run.clone());
            let (virtio, packet) = part.split_at(VNET_HEADER);
            assert_eq!(virtio[1] & !GSO_ECN == GSO_TCPV4, run.len() > 1);
            assert_eq!(usize::from(get16(packet, 2)), packet.len());
            assert_eq!(get16(packet, 4), 0xffffu16.wrapping_add(run.start as u16));
            assert_eq!(fold(sum16(&packet[..20])), 0xffff, "IP header checksum");
            let tcp = &packet[20..];
            let sequence = u32::from_be_bytes([tcp[4], tcp[5], tcp[6], tcp[7]]);
            assert_eq!(
                sequence,
                0xffff_ff00u32.wrapping_add(run.start as u32 * 1448)
            );
            assert_eq!(tcp[13] & FLAG_FIN != 0, run.end == 7);
            assert_eq!(tcp[13] & FLAG_CWR != 0, run.start == 0);
            assert_eq!(get16(tcp, 16), pseudo_header_sum(&packet[..20], tcp.len()));
            let bytes: u32 = run.map(|n| whole.segment_bytes(n) - 52).sum();
            assert_eq!(bytes as usize, tcp.len() - 32);
            joined.extend_from_slice(&tcp[32..]);
        }
        assert_eq!(joined, bytes[VNET_HEADER + 52..]);
    }

    #[test]
    fn a_burst_that_contradicts_itself_is_refused() {
        let good = burst(4000, 1448);
        let mut not_tcp = good.clone();
        not_tcp[VNET_HEADER + 9] = 17;
        let mut no_size = good.clone();
        no_size[4..6].fill(0);
        for bytes in [
            &not_tcp[..],
            &no_size,
            &good[..VNET_HEADER + 52],
            &good[..VNET_HEADER + 8],
        ] {
            assert_eq!(Burst::parse(bytes).unwrap_err(), BurstError::Shape);
        }
        let mut udp = good;
        udp[1] = 5;
        assert_eq!(Burst::parse(&udp).unwrap_err(), BurstError::Kind(5));
        assert_eq!(Burst::parse(&[0; 10]).unwrap_err(), BurstError::Short(10));
    }
}
