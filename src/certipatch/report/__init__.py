"""Tables, pages and figures from records; torch is loaded only where a picture is asked for."""
