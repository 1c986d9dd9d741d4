//! A TUN device, opened: IP packets in and out of the network namespace it was made in.
//!
//! The device belongs to the namespace of the thread that opens it; the descriptor works from any.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::ioctl::{IntegerSetter, Updater, ioctl};

use super::burst::VNET_HEADER;
use crate::LabError;

// From linux/if_tun.h.
const TUNSETIFF: u32 = 0x4004_54ca;
const TUNSETOFFLOAD: u32 = 0x4004_54d0;
const TUNSETVNETHDRSZ: u32 = 0x4004_54d8;
const IFF_TUN: u16 = 0x0001;
const IFF_NO_PI: u16 = 0x1000;
const IFF_VNET_HDR: u16 = 0x4000;
const TUN_F_CSUM: usize = 0x01;
const TUN_F_TSO4: usize = 0x02;
const TUN_F_TSO_ECN: usize = 0x08;

/// `struct ifreq`, as far as TUNSETIFF uses it.
#[repr(C)]
struct InterfaceRequest {
    name: [u8; 16],
    flags: u16,
    rest: [u8; 22],
}

#[derive(Debug)]
pub struct Tun {
    fd: OwnedFd,
}

impl Tun {
    /// Makes the device in the calling thread's network namespace, non-blocking, with a
    /// `virtio_net_hdr` before each packet and TCP over IPv4 in bursts. It goes when this is dropped.
    pub fn create(device: &str) -> Result<Tun, LabError> {
        let failed = |step| {
            move |errno: Errno| LabError::Tun {
                device: device.to_owned(),
                step,
                source: errno.into(),
            }
        };
        let mut name = [0; 16];
        if device.is_empty() || device.len() >= name.len() {
            return Err(LabError::InterfaceName {
                name: device.to_owned(),
            });
        }
        name[..device.len()].copy_from_slice(device.as_bytes());
        let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let fd = rustix::fs::open("/dev/net/tun", flags, Mode::empty())
            .map_err(failed("opening /dev/net/tun"))?;
        let mut request = InterfaceRequest {
            name,
            flags: IFF_TUN | IFF_NO_PI | IFF_VNET_HDR,
            rest: [0; 22],
        };
        let mut header = VNET_HEADER as i32;
        // SAFETY: TUNSETIFF reads and writes a `struct ifreq`: 40 bytes here as in the kernel (the
        // union's largest member is 24 bytes), and it lives through the call.
        unsafe { ioctl(&fd, Updater::<TUNSETIFF, _>::new(&mut request)) }
            .map_err(failed("TUNSETIFF"))?;
        // SAFETY: TUNSETVNETHDRSZ reads an `int` by pointer, which lives through the call.
        unsafe { ioctl(&fd, Updater::<TUNSETVNETHDRSZ, _>::new(&mut header)) }
            .map_err(failed("TUNSETVNETHDRSZ"))?;
        // SAFETY: TUNSETOFFLOAD takes its flags as the argument itself; no memory is involved.
        unsafe {
            let offload = TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO_ECN;
            ioctl(&fd, IntegerSetter::<TUNSETOFFLOAD>::new_usize(offload))
        }
        .map_err(failed("TUNSETOFFLOAD"))?;
        Ok(Tun { fd })
    }
}

impl AsFd for Tun {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
