//! What a peer sends before anybody knows who it is: a greeting, frames in pieces of any length, messages. Nothing
//! panics, nothing is set aside beyond its limit, and what is accepted is written again byte for byte.
#![no_main]

use blockferry_transport::frame::{Frame, FrameDecoder, MAX_BODY, MAX_BODY_BEFORE_AUTHENTICATION};
use blockferry_transport::{Message, PREAMBLE_BYTES, Preamble};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (bool, u8, &[u8])| {
    let (trusted, pieces, bytes) = input;
    if let Ok(Some(preamble)) = Preamble::decode(bytes) {
        let again = Preamble::decode(&preamble.encode());
        assert_eq!(again.ok().flatten(), Some(preamble));
        drop(Preamble::OURS.version_with(preamble));
    }
    let from = PREAMBLE_BYTES.min(bytes.len());
    let bytes = if pieces % 2 == 0 {
        &bytes[from..]
    } else {
        bytes
    };
    let most = if trusted {
        MAX_BODY
    } else {
        MAX_BODY_BEFORE_AUTHENTICATION
    };
    let mut decoder = FrameDecoder::new();
    if trusted {
        decoder.trust();
    }
    for piece in bytes.chunks(usize::from(pieces).max(1)) {
        decoder.push(piece);
        loop {
            match decoder.next_frame() {
                Ok(Some(frame)) => {
                    assert!(frame.body.len() <= most);
                    check(&frame);
                }
                Ok(None) => break,
                Err(refused) => return drop(refused.to_string()),
            }
        }
    }
});

fn check(frame: &Frame) {
    let Ok(message) = Message::decode(frame) else {
        return;
    };
    drop(format!("{message:?} {}", message.name()));
    let mut bytes = Vec::new();
    message.encode(&mut bytes);
    let mut decoder = FrameDecoder::new();
    decoder.trust();
    decoder.push(&bytes);
    let again = decoder
        .next_frame()
        .expect("it is whole")
        .expect("one frame");
    assert_eq!(again.body, frame.body);
    assert_eq!(again.kind, frame.kind);
}
