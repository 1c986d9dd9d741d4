//! Bare copies from host to host, to compare with: a TCP stream, and a file over TLS.

use crate::LabError;
use crate::net::{Host, Lab};
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::pki_types::{PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection};

const PORT: u16 = 5201;

/// Bytes handed over at once.
const BLOCK: usize = 256 << 10;

fn failed(step: &'static str) -> impl FnOnce(io::Error) -> LabError {
    let address = SocketAddr::from((Host::B.wan_address(), PORT));
    move |source| LabError::Socket {
        address,
        step,
        source,
    }
}

/// A connection from host A to host B; `congestion`: the kernel's default without one.
fn connect(lab: &Lab, congestion: Option<&str>) -> Result<(TcpStream, TcpStream), LabError> {
    let address = SocketAddr::from((Host::B.wan_address(), PORT));
    let listener = lab.namespace(Host::B).run("sink", || {
        TcpListener::bind(address).map_err(failed("bind"))
    })?;
    let sender = lab.namespace(Host::A).run("source", || {
        TcpStream::connect(address).map_err(failed("connect"))
    })?;
    if let Some(name) = congestion {
        rustix::net::sockopt::set_tcp_congestion(&sender, name)
            .map_err(|errno| failed("congestion control")(errno.into()))?;
    }
    let (receiver, _) = listener.accept().map_err(failed("accept"))?;
    Ok((sender, receiver))
}

/// What one TCP stream carries over the link, in bits of content a second: all but the first third of `time`
/// counts.
pub fn tcp(lab: &Lab, congestion: Option<&str>, time: Duration) -> Result<f64, LabError> {
    let (mut sender, mut receiver) = connect(lab, congestion)?;
    let socket = sender.try_clone().map_err(failed("share"))?;
    let sending = std::thread::spawn(move || {
        let block = vec![0x5a; BLOCK];
        while sender.write_all(&block).is_ok() {}
    });
    let short = Some(Duration::from_millis(20));
    receiver
        .set_read_timeout(short)
        .map_err(failed("timeout"))?;
    let began = Instant::now();
    let mut block = vec![0; BLOCK];
    let (mut bytes, mut since) = (0_u64, None);
    while began.elapsed() < time {
        if since.is_none() && began.elapsed() >= time / 3 {
            (bytes, since) = (0, Some(Instant::now()));
        }
        bytes += receiver.read(&mut block).unwrap_or(0) as u64;
    }
    let seconds = since.unwrap_or(began).elapsed().as_secs_f64();
    let _ = socket.shutdown(std::net::Shutdown::Both);
    drop(receiver);
    let _ = sending.join();
    Ok(bytes as f64 * 8.0 / seconds)
}

/// What a file's copy took.
#[derive(Clone, Debug)]
pub struct TlsCopy {
    pub seconds: f64,
    pub cipher: String,
}

/// Copies a file over one TLS 1.3 connection: read, sent, received, written, without a sync.
pub fn tls(lab: &Lab, from: &Path, to: &Path) -> Result<TlsCopy, LabError> {
    let (client, server) = configs()?;
    let (sender, receiver) = connect(lab, None)?;
    let mut source = File::open(from).map_err(failed("open the file for"))?;
    let mut sink = File::create(to).map_err(failed("create the file for"))?;
    let began = Instant::now();
    let receiving = std::thread::spawn(move || {
        let connection = ServerConnection::new(server).map_err(io::Error::other)?;
        let mut tls = rustls::StreamOwned::new(connection, receiver);
        let mut block = vec![0; BLOCK];
        loop {
            let bytes = tls.read(&mut block)?;
            if bytes == 0 {
                return Ok::<(), io::Error>(());
            }
            sink.write_all(&block[..bytes])?;
        }
    });
    let name = ServerName::try_from("bench").expect("it is a well-formed host name");
    let connection = ClientConnection::new(client, name).map_err(|e| tls_failed(&e))?;
    let mut tls = rustls::StreamOwned::new(connection, sender);
    let mut block = vec![0; BLOCK];
    loop {
        let bytes = source
            .read(&mut block)
            .map_err(failed("read the file for"))?;
        if bytes == 0 {
            break;
        }
        tls.write_all(&block[..bytes]).map_err(failed("send to"))?;
    }
    let suite = tls.conn.negotiated_cipher_suite();
    tls.conn.send_close_notify();
    while tls.conn.wants_write() {
        tls.conn
            .write_tls(&mut tls.sock)
            .map_err(failed("end at"))?;
    }
    let received = receiving
        .join()
        .expect("a panic there is a fault of this program");
    received.map_err(failed("receive at"))?;
    Ok(TlsCopy {
        seconds: began.elapsed().as_secs_f64(),
        cipher: suite.map_or(String::new(), |suite| format!("{:?}", suite.suite())),
    })
}

fn tls_failed(error: &(dyn std::error::Error + Send + Sync)) -> LabError {
    failed("set up TLS for")(io::Error::other(error.to_string()))
}

fn configs() -> Result<(Arc<ClientConfig>, Arc<ServerConfig>), LabError> {
    let key =
        rcgen::generate_simple_self_signed(vec!["bench".to_owned()]).map_err(|e| tls_failed(&e))?;
    let certificate = key.cert.der().clone();
    let secret = PrivateKeyDer::Pkcs8(key.signing_key.serialize_der().into());
    let mut roots = RootCertStore::empty();
    roots.add(certificate.clone()).map_err(|e| tls_failed(&e))?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let versions = &[&rustls::version::TLS13];
    let client = ClientConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(versions)
        .map_err(|e| tls_failed(&e))?
        .with_root_certificates(roots)
        .with_no_client_auth();
    let server = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(versions)
        .map_err(|e| tls_failed(&e))?
        .with_no_client_auth()
        .with_single_cert(vec![certificate], secret)
        .map_err(|e| tls_failed(&e))?;
    Ok((Arc::new(client), Arc::new(server)))
}
