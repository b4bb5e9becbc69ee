"""In the guest: checks all that was written before, says what it found, and goes on writing.

Number n is a file of random size and a row with its digest, first on the root disk, then on the data disk, each made
durable; only then n is told to the host. So at any moment the root disk has as many as the data disk, or one more.

Beside that one page is written again and again, and the host is told whenever it is durable: nothing that holds up the
guest's writes stays unseen.
"""

import hashlib
import os
import sqlite3
import time

PLACES = ["/work", "/data"]
PORTS = "/dev/virtio-ports"


def port(name):
    path = f"{PORTS}/{name}"
    while not os.path.exists(path):
        time.sleep(0.05)
    return open(path, "w")


def say(line):
    with port("told") as told:
        told.write(line + "\n")


def beat():
    page = os.open(f"{PLACES[1]}/beat", os.O_RDWR | os.O_CREAT | os.O_DSYNC)
    beats, n = port("beats"), 0
    while True:
        n += 1
        os.pwrite(page, str(n).encode().ljust(4096), 0)
        beats.write(f"beat {n}\n")
        beats.flush()
        time.sleep(0.005)


def database(place):
    found = sqlite3.connect(f"{place}/rows")
    found.execute("PRAGMA journal_mode = WAL")
    found.execute("PRAGMA synchronous = FULL")
    found.execute("CREATE TABLE IF NOT EXISTS rows (n INTEGER PRIMARY KEY, digest TEXT NOT NULL)")
    found.commit()
    return found


def check(place, rows):
    """The last number of a place, or what is wrong there."""
    if rows.execute("PRAGMA integrity_check").fetchone()[0] != "ok":
        return None, f"{place}: the database is damaged"
    last = 0
    for n, digest in rows.execute("SELECT n, digest FROM rows ORDER BY n"):
        if n != last + 1:
            return None, f"{place}: {n} follows {last}"
        try:
            with open(f"{place}/{n % 500}", "rb") as file:
                content = file.read()
        except OSError as error:
            return None, f"{place}: {error}"
        # A name is used again after 500 numbers: the file is of this number or a later one.
        if hashlib.sha256(content).hexdigest() != digest and not later(rows, n, content):
            return None, f"{place}: file of {n} is not what was written"
        last = n
    return last, None


def later(rows, n, content):
    digest = hashlib.sha256(content).hexdigest()
    row = rows.execute("SELECT n FROM rows WHERE digest = ?", (digest,)).fetchone()
    # The file may be newer than the last row: its row was not durable yet.
    last = rows.execute("SELECT max(n) FROM rows").fetchone()[0]
    return (row and row[0] > n and row[0] % 500 == n % 500) or (row is None and (last + 1) % 500 == n % 500)


def write(place, rows, n):
    content = os.urandom(512 + int.from_bytes(os.urandom(2), "little"))
    path = f"{place}/{n % 500}"
    with open(path + ".new", "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.rename(path + ".new", path)
    directory = os.open(place, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)
    rows.execute("INSERT INTO rows VALUES (?, ?)", (n, hashlib.sha256(content).hexdigest()))
    rows.commit()


def main():
    databases = [database(place) for place in PLACES]
    lasts = []
    for place, rows in zip(PLACES, databases):
        last, wrong = check(place, rows)
        if wrong:
            say(f"wrong {wrong}")
            return
        lasts.append(last)
    with open("/proc/sys/kernel/random/boot_id") as file:
        boot = file.read().strip()
    say(f"checked {lasts[0]} {lasts[1]} {boot}")
    n = lasts[0]
    if lasts[1] < n:
        write(PLACES[1], databases[1], n)
    while True:
        n += 1
        for place, rows in zip(PLACES, databases):
            write(place, rows, n)
        say(f"wrote {n}")


if os.fork() == 0:
    beat()
main()
