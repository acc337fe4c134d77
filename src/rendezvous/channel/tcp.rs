//! What a TCP connection between nodes is set to.

use std::time::Duration;

use tokio::net::TcpStream;

/// Small messages go out at once, and the kernel gives a connection up when nothing is acknowledged for `silence`: the
/// pings see a peer that says nothing, this one sees a peer that hears nothing.
///
/// A kernel that refuses leaves the link slower or later, and no less right.
pub(super) fn tune(stream: &TcpStream, silence: Duration) {
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "connection to another node keeps small messages back");
    }
    let millis = u32::try_from(silence.as_millis()).unwrap_or(u32::MAX);
    if let Err(error) = rustix::net::sockopt::set_tcp_user_timeout(stream, millis) {
        tracing::debug!(%error, "connection to another node has no limit for acknowledgements");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_kernel_takes_both() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        tune(&stream, Duration::from_secs(5));
        assert!(stream.nodelay().unwrap());
        assert_eq!(rustix::net::sockopt::tcp_user_timeout(&stream).unwrap(), 5000);
    }
}
