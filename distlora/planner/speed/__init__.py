"""Operations, bytes and seconds of a step."""
