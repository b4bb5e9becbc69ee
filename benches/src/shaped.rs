//! A wire with a rate and a latency, between two ends in one process.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use blockferry::Link;

/// Bytes that travel together.
const PARCEL_BYTES: usize = 16 * 1024;
/// What the wire's end holds back before it stops taking more, as the buffer of a network card does.
const QUEUE: Duration = Duration::from_millis(20);

/// What a wire does to what it carries, each way.
#[derive(Clone, Copy, Debug)]
#[expect(clippy::exhaustive_structs, reason = "plain figures")]
pub struct Wire {
    /// Its rate.
    pub bytes_per_second: f64,
    /// From one end to the other.
    pub latency: Duration,
}

impl Wire {
    /// Two ends with this wire between them.
    ///
    /// # Panics
    /// The system has no sockets.
    #[must_use]
    pub fn pair(self) -> (Link, Link) {
        let socket = || UnixStream::pair().expect("the system has sockets");
        let ((one, near), (other, far)) = (socket(), socket());
        let clone = |socket: &UnixStream| socket.try_clone().expect("the system has files");
        self.carry(clone(&near), clone(&far));
        self.carry(far, near);
        let link =
            |socket| Link::over_socket(socket, "the other side").expect("the system has files");
        (link(one), link(other))
    }

    /// Until the sender's end is closed, or the receiver's.
    fn carry(self, from: UnixStream, to: UnixStream) {
        let on_the_way = QUEUE + self.latency;
        let parcels = self.bytes_per_second * on_the_way.as_secs_f64() / PARCEL_BYTES as f64;
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a handful"
        )]
        let (send, receive) = sync_channel(parcels.clamp(1.0, 65536.0) as usize);
        thread::spawn(move || self.take(from, &send));
        thread::spawn(move || deliver(&receive, to));
    }

    fn take(self, mut from: UnixStream, send: &SyncSender<(Instant, Vec<u8>)>) {
        let mut free_at = Instant::now();
        loop {
            let mut parcel = vec![0; PARCEL_BYTES];
            let Ok(count @ 1..) = from.read(&mut parcel) else {
                return;
            };
            parcel.truncate(count);
            let takes = Duration::from_secs_f64(count as f64 / self.bytes_per_second);
            free_at = free_at.max(Instant::now()) + takes;
            if send.send((free_at + self.latency, parcel)).is_err() {
                return;
            }
        }
    }
}

fn deliver(receive: &Receiver<(Instant, Vec<u8>)>, mut to: UnixStream) {
    for (arrives, parcel) in receive {
        thread::sleep(arrives.saturating_duration_since(Instant::now()));
        if to.write_all(&parcel).is_err() {
            return;
        }
    }
    // Closed already is closed.
    to.shutdown(Shutdown::Write).ok();
}

#[cfg(test)]
mod tests {
    use super::*;
    use blockferry::transport::Message;
    use blockferry::{Connection, Deadlines};

    #[test]
    fn a_wire_carries_everything_no_faster_than_it_can() {
        let wire = Wire {
            bytes_per_second: 10e6,
            latency: Duration::from_millis(30),
        };
        let (one, other) = wire.pair();
        let other =
            thread::spawn(|| Connection::open(other, Deadlines::default()).expect("greets"));
        let begun = Instant::now();
        let one = Connection::open(one, Deadlines::default()).expect("greets");
        assert!(begun.elapsed() >= wire.latency, "a greeting takes its time");
        let other = other.join().expect("no panic");
        other.trust();
        let data = Message::Data {
            blocks: Vec::new(),
            runs: Vec::new(),
            frame: vec![1; 1_000_000],
        };

        let begun = Instant::now();
        one.outbox().send_data(data.clone()).expect("sent");

        assert_eq!(other.receive().expect("arrives"), data);
        assert!(
            begun.elapsed() >= Duration::from_millis(130),
            "its rate and its latency"
        );
    }
}
