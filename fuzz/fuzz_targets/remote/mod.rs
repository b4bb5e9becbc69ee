//! The roles as they are in the engine, where they are private, and what drives them.

#[path = "../../../crates/blockferry-engine/src/remote/data.rs"]
mod data;
#[path = "../../../crates/blockferry-engine/src/remote/pair.rs"]
mod pair;
#[path = "../../../crates/blockferry-engine/src/remote/protocol.rs"]
mod protocol;
#[path = "../../../crates/blockferry-engine/src/remote/source_role.rs"]
mod source_role;
#[path = "../../../crates/blockferry-engine/src/remote/target_role.rs"]
mod target_role;

use std::sync::OnceLock;

use blockferry_core::BlockSize;
use blockferry_transport::frame::Frame;
use blockferry_transport::message::Begin;

use self::pair::Pair;
use self::protocol::{ProtocolError, ProtocolResult, block_number, unexpected, violates};

/// Regions of 1 MiB, the last one cut off.
const BYTES: usize = (2 << 20) + 9_000;

fn block_size() -> BlockSize {
    BlockSize::new(4096).expect("a power of two")
}

/// An image with a block here and there.
fn image(fill: u8) -> Vec<u8> {
    let mut image = vec![0; BYTES];
    for (number, block) in image.chunks_mut(4096).enumerate() {
        let (number, fill) = (number as u64, u64::from(fill));
        if number % 7 == 1 || number % (11 + fill) == 2 {
            let mut word = (number << 8 | fill % 3).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
            // Noise: its bytes travel as they are, so that one that is changed unpacks as another.
            for bytes in block.chunks_mut(8) {
                word ^= word << 13;
                word ^= word >> 7;
                word ^= word << 17;
                bytes.copy_from_slice(&word.to_le_bytes()[..bytes.len()]);
            }
        }
    }
    image
}

fn images() -> &'static [Vec<u8>; 4] {
    static IMAGES: OnceLock<[Vec<u8>; 4]> = OnceLock::new();
    IMAGES.get_or_init(|| [0, 1, 2, 5].map(image))
}

pub(super) fn run(bytes: &[u8]) {
    let Some(([shape, changed, window], choices)) = bytes.split_first_chunk() else {
        return;
    };
    let begin = Begin {
        block_size: block_size(),
        exact: shape & 1 == 1,
        level: 1,
        window: u32::from(*window & 0x7F),
        mapped: *window & 0x80 != 0,
    };
    let images = images();
    let old = &images[usize::from(shape >> 1) % 4];
    let new = &images[usize::from(shape >> 3) % 4];
    let mut orders: Vec<u8> = choices.iter().rev().copied().collect();
    let forged = forged(&mut orders);
    let length = orders.len();
    let mut left = orders;
    // Once the input is used up, everything is done in turn.
    let mut turn = 0;
    let draw = move |below: usize| match left.pop() {
        Some(choice) => usize::from(choice) % below,
        None => {
            turn += 1;
            turn % below
        }
    };
    let whole = shape & 0x80 != 0 && !begin.mapped;
    let mut pair = Pair::new(old, new, begin, whole, draw);
    pair.changed_in = usize::from(*changed);
    pair.changes_pages_only = shape & 0x20 != 0;
    pair.repeats = shape & 0x40 != 0;
    let mut forged = forged.into_iter();
    for step in 0..length + 4000 {
        if step % 5 == 4
            && let Some((to_target, frame)) = forged.next()
        {
            pair.forge(to_target, &frame);
        }
        match pair.step() {
            Ok(None) => {}
            Ok(Some(root)) => {
                assert_eq!(pair.root(), root, "what counts as done is what was told");
                return;
            }
            Err(_refused) => return,
        }
    }
}

/// Frames that nobody sent: how many, and for each its side, kind, length and body.
fn forged(orders: &mut Vec<u8>) -> Vec<(bool, Frame)> {
    let count = orders.pop().unwrap_or(0) % 8;
    let mut frames = Vec::new();
    for _ in 0..count {
        let (Some(kind), Some(length)) = (orders.pop(), orders.pop()) else {
            break;
        };
        let from = orders.len().saturating_sub(usize::from(length));
        let body = orders.split_off(from).into_iter().rev().collect();
        let frame = Frame {
            kind: kind % 22,
            body,
        };
        frames.push((kind >= 128, frame));
    }
    frames
}
