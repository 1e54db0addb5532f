"""Songs from scores and scores from songs, through music21.

``read_score`` reads lyrics with the notes that they are sung on, ``read_melody`` notes alone;
``corpus_songs`` the scores that music21 itself carries, ``folder_songs`` your own. ``write_score``
writes MusicXML and MIDI. They need ``pip install tokcore[music]``.
"""

from tokcore.integrations.music21.corpus import Reading, corpus_songs, folder_songs
from tokcore.integrations.music21.heads import NoLyricsError, ScoreError
from tokcore.integrations.music21.lyrics import AS_MARKED, Sentences
from tokcore.integrations.music21.read import read_melody, read_score
from tokcore.integrations.music21.write import write_score

__all__ = [
    "AS_MARKED",
    "NoLyricsError",
    "Reading",
    "ScoreError",
    "Sentences",
    "corpus_songs",
    "folder_songs",
    "read_melody",
    "read_score",
    "write_score",
]
